"""A batch that memory does not hold: the result is the whole's, nothing of a failed try stays, none is tried twice.

Memory runs out here by hooks on a layer, which raise what PyTorch raises where a pass has more than so many tokens.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
from test_packing import rows_of
from tiny_models import CPU, build_policy, randomise
from torch.nn.modules.module import register_module_forward_pre_hook
from toy_task import SMALL, TASK

from grpo import build
from grpo.checkpoint import read_state
from grpo.config import Config
from grpo.fitting import Fitting
from grpo.folder import list_checkpoints
from grpo.loss import build_loss
from grpo.metrics import TIMING_PREFIXES
from grpo.packing import BatchLimit, build_packer, halve, lay_out_longest
from grpo.policy.fused import FusedLayer
from grpo.policy.optimizer import state_to_come
from grpo.run import main
from grpo.types import Group

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a capacity of 1 GiB")
WHERE = {  # a pass of this kind runs out
    "forward": lambda: True,
    "with gradient": torch.is_grad_enabled,
    "without gradient": lambda: not torch.is_grad_enabled(),
}


def run_out(policy, most, where, told=None):
    """From now on this pass over more than `most` tokens runs out of memory, in the model's last layer. told: how many
    tokens each pass has, and whether it fails."""
    passes = [] if told is None else told

    def check(tokens):
        passes.append((tokens, tokens > most))
        if tokens > most:
            raise torch.OutOfMemoryError(str(FULL))

    layer = policy.model.layers[-1]
    if where == "backward":
        return layer.register_full_backward_pre_hook(lambda module, gradients: check(len(gradients[0])))

    def before(module, inputs):
        if WHERE[where]():
            check(len(inputs[0]))

    return layer.register_forward_pre_hook(before)


def gradient_of(policy, config, groups, most=10_000, where="forward"):
    """The gradient of an optimizer step, flat, its metrics and how often a batch was split. The policy that sampled is
    another than the one that is updated, so that ratios are not 1."""
    loss = build_loss(config)
    policy.fit = Fitting(BatchLimit(10_000))
    policy.optimizer.zero_grad()
    hook = run_out(policy, most, where)
    randomise(policy)
    [batches] = build_packer(config, CPU)(groups)
    loss.prepare(policy, batches)
    randomise(policy, seed=2)
    loss.prepare_step(policy, batches)
    sums = [part for batch in batches for part in policy.fit(partial(policy.backward, loss=loss), batch)]
    hook.remove()
    gradient = torch.cat([parameter.grad.flatten() for parameter in policy.store.parameters()])
    return gradient, loss.summarize(sums), policy.fit.count()


def assert_same_step(one, other):
    assert other[0].norm() > 1e-4
    assert (one[0] - other[0]).norm() <= 1e-6 * other[0].norm()
    assert one[1] == pytest.approx(other[1], rel=1e-6, abs=1e-6)


LOSSES = {
    "grpo": {},
    "gspo": dict(objective="gspo", clip_low=0.05, clip_high=0.05, correction="sequence_tis"),
    "cispo": dict(objective="cispo", cispo_cap=1.1, correction="token_mask"),
    "dual clip": dict(dual_clip=1.05, correction="none"),
    "k1": dict(kl_coef=0.3, kl_estimator="k1", normalization="bnpo"),
    "k2": dict(kl_coef=0.3, kl_estimator="k2", normalization="dr_grpo"),
    "k3": dict(kl_coef=0.3, kl_estimator="k3", normalization="grpo"),
    "weighted": dict(kl_coef=0.3, correction="sequence_mask", correction_floor=0.1, correction_cap=9.0),
    "entropy": dict(entropy_coef=0.2, normalization="grpo"),
    "top entropy": dict(top_entropy=0.3),
    "off-policy mask": dict(off_policy_mask=0.1, normalization="dr_grpo"),
    "everything": dict(objective="gspo", kl_coef=0.1, entropy_coef=0.1, top_entropy=0.5, normalization="bnpo"),
}


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """What is there already is not looked through again after each of the failures."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def policy(checkpoint):
    """With norms of ones, as a fresh model has them: others amplify the rounding of sums."""
    policy = build_policy(Config(model=checkpoint("qwen3"), base="float32", device="cpu", lora_rank=3, lora_alpha=6.0))
    for name, weight in policy.model.small_weights():
        if "norm" in name:
            weight.data.fill_(1)
    return policy


@pytest.mark.parametrize("epochs", [1, 2], ids=["the pass's own ratio", "a stored one"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_in_parts_is_the_step(name, epochs, policy, groups):
    config = Config(epochs=epochs, **LOSSES[name])
    whole = gradient_of(policy, config, groups)
    assert whole[2] == 0
    for where in ("forward", "backward"):
        for most in (60, 25):
            split = gradient_of(policy, config, groups, most, where)
            assert split[2] >= 1
            assert_same_step(split, whole)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_other_models_are_split_too(name, base, groups, tiny_config):
    config = tiny_config(name, base=base, kl_coef=0.1, recompute="layer")
    policy, loss = build_policy(config), build_loss(config)
    results = []
    for most in (1000, 20):
        policy.fit = Fitting(BatchLimit(most))
        policy.fit.cut = policy.fit._cut
        [[batch]] = build_packer(config, CPU)(groups)
        randomise(policy)
        loss.prepare(policy, [batch])
        sums = policy.fit(partial(policy.backward, loss=loss), batch)
        gradient = torch.cat([parameter.grad.flatten() for parameter in policy.store.parameters()])
        results.append((gradient, loss.summarize(sums), len(sums)))
        for parameter in policy.store.parameters():
            parameter.grad = None
    whole, split = results
    assert (whole[2], split[2]) == (1, 6)
    assert_same_step(split, whole)


def test_halves_have_the_same_completions_in_order(groups):
    """Down to single completions, with what the loss has stored of each token."""
    [[batch]] = build_packer(Config(), CPU)(groups)
    batch.old_logprobs = torch.arange(len(batch.tokens)).float()
    batch.in_top = batch.tokens % 2 == 0
    waiting, seen = [batch], []
    while waiting:
        first, *waiting = waiting
        halves = halve(first)
        seen.append([row[:2] for half in halves for row in rows_of(half)])
        assert seen[-1] == [row[:2] for row in rows_of(first)]
        for name in ("old_logprobs", "in_top", "weights", "advantages", "sampler_logprobs", "tokens"):
            parts = [getattr(half, name)[half.mask] for half in halves]
            assert torch.equal(torch.cat(parts), getattr(first, name)[first.mask]), name
        assert all(len(half.reference_logprobs) == 0 for half in halves)
        assert all(half.num_sequences < first.num_sequences for half in halves) or len(halves) == 1
        waiting = [*(half for half in halves if half is not first), *waiting]
    assert [len(rows) for rows in seen].count(1) == 9


def test_a_cut_is_between_groups_where_the_larger_half_is_smallest(groups):
    [[batch]] = build_packer(Config(), CPU)(groups)
    assert batch.layout.completion_lengths == ((5, 1, 13), (3, 3, 2), (9, 4, 6))
    first, second = halve(batch)  # of 26, 9 and 31 tokens
    assert first.layout.completion_lengths == ((5, 1, 13), (3, 3, 2))
    assert [half.layout.completion_lengths for half in halve(second)] == [((9,),), ((4, 6),)]
    assert [half.layout.prompt_lengths for half in halve(second)] == [(12,), (12,)]
    [[alone]] = build_packer(Config(), CPU)([pick(groups[0], 2)])
    assert halve(alone) == [alone]


def pick(group, *places):
    """The group with some of its completions."""
    group.completions = [group.completions[place] for place in places]
    group.advantages = group.advantages[list(places)]
    return group


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("where", ["with gradient", "backward", "without gradient"])
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_no_tensor_of_a_failed_try_survives(where, recompute, groups, tiny_config):
    """Every tensor that the layers saw, and the gradients that had come so far, are gone when it is tried again."""
    config = tiny_config(epochs=2, kl_coef=0.1, recompute=recompute)
    policy, loss = build_policy(config), build_loss(config)
    randomise(policy)
    [[batch]] = build_packer(config, CPU)(groups)
    seen, tries = [], []

    def watch(module, inputs, output):
        seen.extend(map(weakref.ref, (inputs[0], output)))
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.append(weakref.ref(gradient)))

    def begin(module, inputs):
        """Before the first layer: what the try before this left."""
        if tries and tries[-1]:
            assert [tensor().shape for tensor in seen if tensor() is not None] == []
        seen.clear()

    first, last = policy.model.layers[0], policy.model.layers[-1]
    for layer in (first, last):
        layer.register_forward_hook(watch)
    policy.model.embed.register_forward_pre_hook(begin)

    def fail(tokens):
        tries.append(tokens > 40)
        if tokens > 40:
            held = torch.ones(tokens, 7)  # of the frame that fails
            seen.append(weakref.ref(held))
            error = torch.OutOfMemoryError(str(FULL))
            raise error  # which holds the frame that holds it

    if where == "backward":  # of the first layer, after that of the last
        first.register_full_backward_pre_hook(lambda module, gradients: fail(len(gradients[0])))
    else:

        def before(module, inputs):
            if WHERE[where]():
                fail(len(inputs[0]))

        last.register_forward_pre_hook(before)
    gc.disable()
    try:
        policy.update([[batch]], loss, 1e-3)
    finally:
        gc.enable()
    assert any(tries) and not all(tries)


def test_what_is_no_want_of_memory_and_a_completion_that_does_not_fit_are_raised(groups, tiny_config):
    config = tiny_config()
    policy, loss = build_policy(config), build_loss(config)
    pack = build_packer(config, CPU, policy.fit.limit)
    hook = policy.model.layers[0].register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        policy.update(pack(groups), loss, 1e-3)
    hook.remove()
    layer = policy.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda module, inputs: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        policy.update(pack(groups), loss, 1e-3)
    hook.remove()
    assert policy.fit.count() == 0
    run_out(policy, 15, "with gradient")  # the first group's third completion has 20 tokens with its prompt
    with pytest.raises(torch.OutOfMemoryError, match=r"20\.00 GiB") as raised:
        policy.update(pack(groups), loss, 1e-3)
    assert raised.traceback[-1].name == "check"
    assert policy.version == 0 and not policy.optimizer.state


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:163"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:30],
)
def test_memory_runs_out_in_many_words(error, groups):
    [[batch]] = build_packer(Config(), CPU)(groups)
    tried = []

    def work(part):
        tried.append(part.num_sequences)
        if part.num_sequences > 5:
            raise error
        return part.num_sequences

    fit = Fitting(BatchLimit(100), lambda note: None)
    assert fit(work, batch) == [3, 3, 1, 2] and tried == [9, 6, 3, 3, 1, 2]
    assert fit.count() == 2


def test_one_failure_is_enough(groups, tiny_config):
    """The other batches of the step, the epochs that follow and the steps after it are no larger than what did fit."""
    config = tiny_config(epochs=2, mini_batches=1, kl_coef=0.1)
    policy, loss = build_policy(config), build_loss(config)
    told, passes = [], []
    policy.fit.tell = told.append
    pack = build_packer(config, CPU, policy.fit.limit)
    run_out(policy, 40, "forward", passes)
    groups_twice = [*groups, *groups]
    metrics = policy.update([[*pack(groups)[0], *pack(groups)[0]]], loss, 1e-3, epochs=2)
    assert metrics["policy/split_batches"] == 1
    assert [fails for _, fails in passes].count(True) == 1
    [note] = told
    assert "a batch of 66 tokens" in note and "at most 35 tokens" in note and "--tokens-per-batch 35" in note
    assert policy.fit.limit.state() == [16384, 35]
    assert all(len(batch.tokens) <= 35 for batch in pack(groups_twice)[0])
    metrics = policy.update(pack(groups_twice), loss, 1e-3, epochs=2)
    assert metrics["policy/split_batches"] == 0
    assert [fails for _, fails in passes].count(True) == 1 and len(told) == 1


@pytest.mark.parametrize("most", [40, 22, 21])
def test_no_size_fails_twice(most, groups, tiny_config):
    """A half that waits for its turn is not tried where its like has failed."""
    config = tiny_config()
    policy, loss = build_policy(config), build_loss(config)
    told, passes = [], []
    policy.fit.tell = told.append
    run_out(policy, most, "with gradient", passes)
    doubled = [Group(group.prompt, group.completions * 2, advantages=group.advantages.repeat(2)) for group in groups]
    metrics = policy.update(build_packer(config, CPU)(doubled), loss, 1e-3)
    failed = [tokens for tokens, fails in passes if fails]
    assert failed == sorted(failed, reverse=True) and len(set(failed)) == len(failed) == len(told)
    assert metrics["policy/split_batches"] == len(failed) <= 4


def test_the_limit_is_remembered_as_long_as_the_same_is_asked_for():
    limit = BatchLimit(100)
    limit.lower(40)
    limit.lower(60)
    for asked, expected in ((100, 40), (90, 90), (200, 200)):
        resumed = BatchLimit(asked)
        resumed.restore(limit.state())
        assert resumed.tokens == expected
    fresh = BatchLimit(100)
    fresh.restore([])  # a checkpoint of a version that had none
    assert fresh.tokens == 100


def test_reading_in_parts_is_reading(policy, groups):
    """What the canary and the audit read."""
    policy.fit = Fitting(BatchLimit(10_000))
    randomise(policy)
    [[batch]] = build_packer(Config(), CPU)(groups)
    draws = torch.rand(int(batch.mask.sum()), generator=torch.Generator().manual_seed(0))
    whole = (*policy.read(batch), policy.reference_logprobs(batch), *policy.ranks(batch, draws))
    hook = run_out(policy, 30, "without gradient")
    parts = (*policy.read(batch), policy.reference_logprobs(batch), *policy.ranks(batch, draws))
    hook.remove()
    assert policy.fit.count() >= 1
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert policy.store.scale == 2


@pytest.mark.parametrize("tokens", [1, 30, 31, 75, 100, 101, 1000, 5000])
@pytest.mark.parametrize("sizes", [(8, 8, 1), (3, 2, 1), (4, 5, 3)])
def test_the_longest_batch_has_all_the_tokens_that_one_can_have(tokens, sizes):
    """No batch of these lengths is larger, and none has a completion that is longer."""
    prompts, group_size, mini_batches = sizes
    config = Config(
        prompts_per_step=prompts, group_size=group_size, mini_batches=mini_batches, max_completion_tokens=20
    )
    batch = lay_out_longest(config, BatchLimit(tokens), 11, [5, 6, 7], CPU)
    rows = list(rows_of(batch))
    of_step = -(-prompts // mini_batches) * (11 + group_size * 20)
    # Where no room is left for another prompt and a token.
    assert max(31, min(tokens, of_step) - 11) <= len(batch.tokens) <= max(31, min(tokens, of_step))
    assert max(len(completion) for _, completion, *_ in rows) == 20
    assert all(prompt == [5, 6, 7, 5, 6, 7, 5, 6, 7, 5, 6] for prompt, *_ in rows)
    assert max(map(len, batch.layout.completion_lengths)) <= group_size
    assert len(batch.layout.prompt_lengths) <= -(-prompts // mini_batches)
    assert batch.advantages.any() and batch.weights[batch.mask].all()


@pytest.mark.parametrize("terms", [{}, dict(epochs=2, kl_coef=0.1, entropy_coef=0.1, top_entropy=0.5)])
def test_nothing_stays_of_a_rehearsal(terms, groups, tiny_config):
    config = tiny_config(recompute="layer", max_completion_tokens=15, **terms)
    states, metrics = [], []
    for rehearses in (False, True):
        policy, loss = build_policy(config), build_loss(config)
        randomise(policy)
        torch.manual_seed(7)
        if rehearses:
            before, drawn = [p.detach().clone() for p in policy.store.parameters()], torch.get_rng_state()
            policy.rehearse(lay_out_longest(config, BatchLimit(60), 9, [4, 5, 6], CPU), loss)
            assert all(map(torch.equal, before, policy.store.parameters()))
            assert all(parameter.grad is None for parameter in policy.store.parameters())
            assert not policy.optimizer.state and policy.version == 0
            assert torch.equal(torch.get_rng_state(), drawn)
        for _ in range(2):
            metrics.append(policy.update(build_packer(config, CPU)(groups), loss, 1e-2, config.epochs))
        states.append([p.detach().clone() for p in policy.store.parameters()])
    assert all(map(torch.equal, *states))
    assert metrics[:2] == metrics[2:] or str(metrics[:2]) == str(metrics[2:])


def test_a_rehearsal_settles_how_large_batches_are(groups, tiny_config):
    config = tiny_config(max_completion_tokens=13)
    policy, loss = build_policy(config), build_loss(config)
    beside = []
    layer = policy.model.layers[0]
    layer.register_forward_pre_hook(lambda module, inputs: beside.append(has_gradients(policy)))
    run_out(policy, 50, "backward")
    policy.rehearse(lay_out_longest(config, BatchLimit(66), 12, [4, 5, 6], CPU), loss)
    assert policy.fit.limit.tokens <= 50
    assert beside and all(beside), "as after the first of a step's batches"
    pack = build_packer(config, CPU, policy.fit.limit)
    assert len(pack(groups)[0]) >= 2
    assert policy.update(pack(groups), loss, 1e-3)["policy/split_batches"] == 0


def has_gradients(policy):
    return all(parameter.grad is not None for parameter in policy.store.parameters())


def test_a_rehearsal_that_fails_leaves_nothing_either(tiny_config):
    config = tiny_config()
    policy, loss = build_policy(config), build_loss(config)
    run_out(policy, 10, "forward")
    with pytest.raises(torch.OutOfMemoryError):
        policy.rehearse(lay_out_longest(config, BatchLimit(66), 12, [4, 5, 6], CPU), loss)
    assert not any(parameter.grad is not None for parameter in policy.store.parameters())


def test_what_the_optimizer_will_hold_lies_beside_a_rehearsal(groups, tiny_config):
    config = tiny_config()
    policy = build_policy(config)
    expected = sum(tensor.nbytes for tensor in state_to_come(policy.optimizer))
    policy.update(build_packer(config, CPU)(groups), build_loss(config), 1e-3)
    held = [value for state in policy.optimizer.state.values() for name, value in state.items() if name != "step"]
    assert expected == sum(tensor.nbytes for tensor in held) > 0
    assert state_to_come(policy.optimizer) == []


# A step of 24,400 tokens, then the same where the process may have no more memory than for a part of it.
REAL = """
import resource, sys
import torch
from functools import partial
from tiny_models import CPU, FUSED, build_policy, randomise, write_checkpoint
from grpo.config import Config
from grpo.loss import build_loss
from grpo.packing import build_packer
from grpo.types import Completion, Group, Prompt

torch.set_num_threads(1)
folder = write_checkpoint(sys.argv[1], FUSED["qwen3"]())
config = Config(model=folder, base="float32", device="cpu", lora_rank=3, kl_coef=0.1, tokens_per_batch=10**6)
policy, loss = build_policy(config), build_loss(config)
randomise(policy)
words = [3 + n * n % 97 for n in range(100)]
groups = [Group(Prompt(n, "", words[n:], {}), [Completion(words, [-4.0] * 100, "", "stop", 0)] * 8) for n in range(28)]
for group in groups:
    group.advantages = torch.linspace(-1, 1, 8)
gradients = []
for room in (None, 120 * 2**20):
    if room:
        held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + room, held + room))
    [batches] = build_packer(config, CPU)(groups)
    loss.prepare(policy, batches)
    for batch in batches:
        policy.fit(partial(policy.backward, loss=loss), batch)
    gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.store.parameters()]))
    policy.optimizer.zero_grad()
    print(policy.fit.count())
whole, parts = gradients
print(float((parts - whole).norm() / whole.norm()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_memory_that_really_runs_out(tmp_path):
    """Large tensors are given back to the system when they are freed, so that the limit is one for the step alone."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path)], capture_output=True, text=True, check=True, env=environment
    )
    told = [line for line in done.stdout.splitlines() if not line.startswith(("note:", "layers:"))]
    untroubled, splits, difference = map(float, told)
    assert untroubled == 0 and splits >= 1
    assert done.stdout.count("note:") == splits
    assert difference < 1e-5


@pytest.fixture
def full_above():
    """limit -> from now on passes with gradient of more tokens than that through a fused layer run out of memory."""
    hooks = []

    def arm(most):
        def exhaust(module, inputs):
            if isinstance(module, FusedLayer) and torch.is_grad_enabled() and len(inputs[0]) > most:
                raise torch.OutOfMemoryError(str(FULL))

        hooks.append(register_module_forward_pre_hook(exhaust))

    yield arm
    for hook in hooks:
        hook.remove()


def run_toy(folder, *flags):
    (folder / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    return main([str(folder / "toy.py"), *SMALL, "--run-dir", str(folder / "run"), *flags])


def steps_of(folder):
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "reward/mean" in line]
    return [{name: x for name, x in step.items() if not name.startswith(TIMING_PREFIXES)} for step in steps]


@pytest.mark.slow
def test_a_run_goes_on_and_a_resumed_one_is_the_same(full_above, tmp_path, capsys):
    for name in ("untroubled", "whole"):
        (tmp_path / name).mkdir()
    few = ["--eval-every", "0", "--save-every", "2"]
    assert run_toy(tmp_path / "untroubled", "--steps", "1", *few) == 0
    full_above(60)
    assert run_toy(tmp_path / "whole", "--steps", "4", *few) == 0
    assert capsys.readouterr().out.count("note: the memory did not hold a batch") == 1
    [first] = steps_of(tmp_path / "untroubled")
    split = steps_of(tmp_path / "whole")
    assert [line["policy/split_batches"] for line in split] == [1, 0, 0, 0]
    assert {**split[0], "policy/split_batches": 0} == pytest.approx(first, rel=1e-4, abs=1e-6)
    shutil.copytree(tmp_path / "whole" / "run", tmp_path / "resumed" / "run")
    earlier, _ = list_checkpoints(tmp_path / "resumed" / "run")
    assert read_state(earlier)[0].batch_limit == [16384, 44]
    assert main(["--resume", str(earlier)]) == 0
    assert "did not hold" not in capsys.readouterr().out
    assert steps_of(tmp_path / "resumed") == split


@pytest.mark.slow
def test_a_run_rehearses_and_is_the_same(full_above, tmp_path, monkeypatch, capsys):
    for name in ("plain", "rehearsed", "full"):
        (tmp_path / name).mkdir()
    few = ["--eval-every", "0", "--save-every", "50", "--steps", "2"]
    assert run_toy(tmp_path / "plain", *few) == 0
    assert "rehearsal" not in capsys.readouterr().out
    monkeypatch.setattr(build, "REHEARSED", ("cpu",))
    assert run_toy(tmp_path / "rehearsed", *few) == 0
    assert "rehearsal: a batch of 92 tokens" in capsys.readouterr().out  # of 18 prompt tokens, where no row has more
    assert steps_of(tmp_path / "rehearsed") == steps_of(tmp_path / "plain")
    full_above(60)
    assert run_toy(tmp_path / "full", *few) == 0
    told = capsys.readouterr().out
    assert told.count("did not hold a batch of 92") == 1 and "rehearsal: a batch of 46 tokens" in told
    assert [step["policy/split_batches"] for step in steps_of(tmp_path / "full")] == [0, 0]


def test_a_run_that_cannot_be_rehearsed_is_not_begun(full_above, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "REHEARSED", ("cpu",))
    full_above(20)
    assert run_toy(tmp_path, "--steps", "2") == 2
    assert "The memory of the GPU ran out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_ends_where_one_completion_does_not_fit(full_above, tmp_path, capsys):
    full_above(20)
    assert run_toy(tmp_path, "--steps", "2", "--eval-every", "0") == 2
    told = capsys.readouterr().err
    assert "The memory of the GPU ran out (the last request was for 20.00 GiB)" in told
    assert "--max-completion-tokens (7)" in told and "Traceback" not in told
