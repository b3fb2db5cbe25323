"""The optimizers: their formula and bitsandbytes' own, saved and gone on with bit for bit, in pages of the host's
memory too; and what is refused.

Pages are CUDA's, so that here tensors of the CPU stand in for them, which say of themselves what such a tensor does.
"""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CPU, build_policy
from torch import nn
from toy_task import SMALL, TASK

from grpo import build
from grpo.checkpoint import Progress, load_checkpoint, save_checkpoint
from grpo.config import Config, UpdateConfig
from grpo.errors import UserError
from grpo.folder import list_checkpoints
from grpo.generators import reader
from grpo.loss import build_loss
from grpo.metrics import TIMING_PREFIXES
from grpo.packing import build_packer
from grpo.policy.optimizer import (
    FEWEST_IN_PAGES,
    STATE_BYTES,
    beside_pages,
    build_optimizer,
    check_optimizer,
    has_pages,
    lift_state,
    optimizer_tensors,
    page_state,
    restore_optimizer,
    state_to_come,
)
from grpo.run import main

KINDS = ["adamw", "adamw8bit"]
SIZES = (3, 5000)  # one that keeps float32 in 8 bits too, and one that does not


def parameters(seed=0, sizes=SIZES):
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(size, generator=draw)) for size in sizes]


def walk(optimizer, steps, first=0):
    """Steps down random gradients of very different sizes, the same for all optimizers."""
    [group] = optimizer.param_groups
    for step in range(first, first + steps):
        draw = torch.Generator().manual_seed(step)
        for parameter in group["params"]:
            size = torch.logspace(-4, 0, len(parameter))
            parameter.grad = (torch.randn(parameter.shape, generator=draw) + 0.3) * size
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def expected(start, settings, steps):
    """AdamW, number by number in float64: Loshchilov and Hutter 2017, algorithm 2."""
    beta1, beta2 = settings.adam_beta1, settings.adam_beta2
    rate, decay = settings.learning_rate, settings.weight_decay
    x = start.double()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        noise = [torch.randn(size, generator=draw) for size in SIZES][SIZES.index(len(x))]
        g = ((noise + 0.3) * torch.logspace(-4, 0, len(x))).double()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
        x = x * (1 - rate * decay) - rate * m_hat / (v_hat.sqrt() + 1e-8)
    return x


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_adamw(kind, decay):
    settings = UpdateConfig(optimizer=kind, learning_rate=0.02, adam_beta1=0.8, adam_beta2=0.95, weight_decay=decay)
    small, large = parameters()
    starts = [parameter.detach().clone() for parameter in (small, large)]
    walk(build_optimizer([small, large], settings), 20)
    for parameter, start in zip((small, large), starts, strict=True):
        wanted = expected(start, settings, 20)
        moved = (wanted - start).norm()
        exact = kind == "adamw" or parameter is small
        # A moment in 8 bits is one of 256 numbers, the nearest a few percent away.
        assert (parameter.detach() - wanted).norm() < (1e-5 if exact else 0.05) * moved


def test_8_bits_are_those_of_bitsandbytes():
    settings = UpdateConfig(optimizer="adamw8bit", learning_rate=0.02, adam_beta2=0.9, weight_decay=0.1)
    ours, theirs = parameters(), parameters()
    walk(build_optimizer(ours, settings), 10)
    walk(bitsandbytes.optim.AdamW8bit(theirs, lr=0.02, betas=(0.9, 0.9), weight_decay=0.1), 10)
    assert all(map(torch.equal, ours, theirs))
    walk(build_optimizer(as_float32 := parameters(), UpdateConfig(learning_rate=0.02)), 10)
    assert not torch.equal(ours[1], as_float32[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved_after", [0, 1, 7])
def test_it_goes_on_bit_for_bit(kind, saved_after):
    settings = UpdateConfig(optimizer=kind, learning_rate=0.02)
    whole = build_optimizer(parameters(), settings)
    walk(whole, 12)
    first = build_optimizer(parameters(), settings)
    walk(first, saved_after)
    second = build_optimizer([nn.Parameter(p.detach().clone()) for p in first.param_groups[0]["params"]], settings)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(first).items()}
    assert bool(tensors) == bool(saved_after)
    restore_optimizer(second, tensors)
    walk(second, 12 - saved_after, saved_after)
    for one, other in zip(second.param_groups[0]["params"], whole.param_groups[0]["params"], strict=True):
        assert torch.equal(one, other)
        assert second.state[one].keys() == whole.state[other].keys()
    assert optimizer_tensors(second).keys() == optimizer_tensors(whole).keys()
    assert all(map(torch.equal, optimizer_tensors(second).values(), optimizer_tensors(whole).values()))


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_will_hold_is_what_it_holds(kind):
    optimizer = build_optimizer(parameters(), UpdateConfig(optimizer=kind))
    to_come = sum(tensor.nbytes for tensor in state_to_come(optimizer))
    walk(optimizer, 1)
    held = optimizer_tensors(optimizer)
    assert to_come == sum(tensor.nbytes for name, tensor in held.items() if not name.endswith("step"))
    assert to_come == pytest.approx(STATE_BYTES[kind] * sum(SIZES), rel=0.02)
    assert state_to_come(optimizer) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_the_other_is_refused(kind, groups, tiny_config, tmp_path):
    [other] = set(KINDS) - {kind}
    saved = build_policy(config := tiny_config(optimizer=other, lora_rank=64))
    saved.update(build_packer(config, CPU)(groups), build_loss(config), 1e-3)
    place = save_checkpoint(tmp_path, saved, Progress(step=1), reader(CPU)(), keep=1)
    with pytest.raises(UserError, match=f"--optimizer {other}, which --optimizer {kind} cannot go on from"):
        load_checkpoint(place, build_policy(tiny_config(optimizer=kind, lora_rank=64)))
    again = build_policy(config)
    load_checkpoint(place, again)
    assert optimizer_tensors(again.optimizer).keys() == optimizer_tensors(saved.optimizer).keys()
    # Before the first step there is no state, and either goes on.
    fresh = build_policy(config)
    place = save_checkpoint(tmp_path, fresh, Progress(step=2), reader(CPU)(), keep=2)
    load_checkpoint(place, build_policy(tiny_config(optimizer=kind, lora_rank=64)))


@pytest.mark.parametrize("damage", ["sizes", "step", "number", "kind"])
def test_a_state_that_is_none_of_these_parameters_is_refused(damage):
    optimizer = build_optimizer(parameters(), UpdateConfig(optimizer="adamw8bit"))
    walk(optimizer, 1)
    tensors = optimizer_tensors(optimizer)
    changed = {
        "sizes": tensors | {"1.state1": torch.zeros(7, dtype=torch.uint8)},
        "step": {name: tensor for name, tensor in tensors.items() if name != "1.step"},
        "number": {name.replace("1.", "9."): tensor for name, tensor in tensors.items()},
        "kind": tensors | {"1.state1": torch.zeros(5000)},
    }
    with pytest.raises((ValueError, KeyError, UserError)):
        restore_optimizer(build_optimizer(parameters(), UpdateConfig(optimizer="adamw8bit")), changed[damage])


@pytest.mark.slow
def test_a_run_in_8_bits_learns_resumes_and_stays_with_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    flags = [*SMALL, "--steps", "4", "--save-every", "2", "--lora-rank", "16", "--optimizer", "adamw8bit"]
    assert main([str(tmp_path / "toy.py"), *flags, "--run-dir", str(tmp_path / "run")]) == 0
    whole = metrics_of(tmp_path / "run")
    assert all(step["sync/moved"] > 0 for step in whole if "sync/moved" in step)
    first, _ = list_checkpoints(tmp_path / "run")
    saved = load_file(first / "optimizer.safetensors")
    assert {tensor.dtype for name, tensor in saved.items() if "state" in name} == {torch.uint8, torch.float32}
    assert main(["--resume", str(first)]) == 0
    assert metrics_of(tmp_path / "run") == whole
    capsys.readouterr()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
        assert main(["--eval", str(tmp_path / "run"), "--eval-prompts", "1"]) == 0  # which optimizes nothing
    assert main(["--resume", str(tmp_path / "run"), "--steps", "5", "--optimizer", "adamw"]) == 2
    assert "state of --optimizer adamw8bit" in capsys.readouterr().err
    assert metrics_of(tmp_path / "run") == whole


def metrics_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in line.items() if not name.startswith(TIMING_PREFIXES)} for line in lines]


@pytest.mark.slow
def test_bitsandbytes_is_imported_only_where_it_is_asked_for():
    code = """
import sys, torch
from grpo.config import Config
from grpo.policy.optimizer import check_optimizer
import grpo.build, grpo.train
check_optimizer(Config(), torch.device("cpu"))
assert "bitsandbytes" not in sys.modules
check_optimizer(Config(optimizer="adamw8bit"), torch.device("cpu"))
assert "bitsandbytes" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_bitsandbytes_it_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    for name in ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.adamw"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    argv = [str(tmp_path / "toy.py"), *SMALL, "--optimizer", "adamw8bit", "--run-dir", str(tmp_path / "run")]
    assert main(argv) == 2
    assert "pip install bitsandbytes" in (told := capsys.readouterr().err) and "Traceback" not in told
    assert not (tmp_path / "run").exists()


def test_a_library_that_does_not_work_here_is_told(monkeypatch):
    def fail(*arguments, **named):
        raise NotImplementedError("no kernel of this name was compiled")

    monkeypatch.setattr(bitsandbytes.functional, "optimizer_update_8bit_blockwise", fail)
    with pytest.raises(UserError, match=r"adamw8bit does not work on cpu here: .*no kernel of this name"):
        check_optimizer(Config(optimizer="adamw8bit"), CPU)


WITH_PAGES = (*SIZES, 120_000)  # and one whose moments are in pages where these are asked for


class Pages:
    """What bitsandbytes did with pages: those that it made, and how often it sent for one before a step."""

    def __init__(self, fewest):
        self.fewest, self.made, self.sent_for = fewest, [], []

    def buffer(self, optimizer, parameter, dtype=torch.float32):
        made = torch.zeros_like(parameter, dtype=dtype)
        if optimizer.is_paged and parameter.numel() >= self.fewest:
            made.is_paged = True
            self.made.append(made)
        return made


@pytest.fixture
def pages(monkeypatch):
    """bitsandbytes as it is on a GPU, pages being tensors of the CPU."""
    pages, of_bitsandbytes = Pages(FEWEST_IN_PAGES), bitsandbytes.optim.optimizer.Optimizer8bit
    monkeypatch.setattr(of_bitsandbytes, "get_state_buffer", lambda *own, **named: pages.buffer(*own, **named))
    monkeypatch.setattr(bitsandbytes.functional, "prefetch_tensor", pages.sent_for.append)
    return pages


def in_8_bits(start, paged):
    optimizer = build_optimizer(start, UpdateConfig(optimizer="adamw8bit", learning_rate=0.02))
    if paged:
        page_state(optimizer)
    return optimizer


@pytest.mark.parametrize("saved_after", [0, 3])
@pytest.mark.parametrize(("first_paged", "then_paged"), [(True, True), (True, False), (False, True)])
def test_pages_change_no_bit(first_paged, then_paged, saved_after, pages):
    """The same as without them in one go, saved with and gone on with, or with them at one of both times alone."""
    walk(whole := in_8_bits(parameters(sizes=WITH_PAGES), paged=False), 5)
    assert not pages.made and not pages.sent_for
    walk(first := in_8_bits(parameters(sizes=WITH_PAGES), first_paged), saved_after)
    assert len(pages.made) == 2 * first_paged * bool(saved_after)
    assert len(pages.sent_for) == 2 * first_paged * saved_after
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(first).items()}
    [group] = first.param_groups
    second = in_8_bits([nn.Parameter(each.detach().clone()) for each in group["params"]], then_paged)
    pages.made.clear()
    restore_optimizer(second, tensors)
    walk(second, 5 - saved_after, saved_after)
    ours, theirs = second.param_groups[0]["params"], whole.param_groups[0]["params"]
    assert all(map(torch.equal, ours, theirs))
    found, wanted = optimizer_tensors(second), optimizer_tensors(whole)
    assert found.keys() == wanted.keys() and all(map(torch.equal, found.values(), wanted.values()))
    # The largest alone is in pages, and made there once: bitsandbytes never frees one.
    assert [id(each) for each in pages.made] == [id(found[f"2.{n}"]) for n in ("state1", "state2") if then_paged]


def test_what_is_in_pages_is_no_memory_of_the_gpu(pages):
    optimizer = in_8_bits(parameters(sizes=WITH_PAGES), paged=True)
    in_float32, scales = 3 * 4, [math.ceil(size / 256) * 4 for size in (5000, 120_000)]
    beside = 2 * (in_float32 + 5000 + sum(scales))
    assert beside_pages(optimizer) == sum(tensor.nbytes for tensor in state_to_come(optimizer)) == beside
    # It is asked of an optimizer that is in float32 too: what 8 bits would leave there.
    assert beside_pages(build_optimizer(parameters(sizes=WITH_PAGES), UpdateConfig())) == beside
    walk(optimizer, 1)
    held = [t for name, t in optimizer_tensors(optimizer).items() if not name.endswith("step")]
    assert sum(t.nbytes for t in held if not hasattr(t, "is_paged")) == beside
    assert sum(t.nbytes for t in held if hasattr(t, "is_paged")) == 2 * 120_000
    assert state_to_come(optimizer) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_was_lifted_is_off_and_comes_back(kind):
    settings = UpdateConfig(optimizer=kind, learning_rate=0.02)
    whole, lifted = build_optimizer(parameters(), settings), build_optimizer(parameters(), settings)
    assert lift_state(lifted) == {}
    for optimizer in (whole, lifted):
        walk(optimizer, 3)
    held = optimizer_tensors(lifted)
    moments = lift_state(lifted)
    assert not lifted.state and state_to_come(lifted)
    assert moments.keys() == held.keys() and all(map(torch.equal, moments.values(), held.values()))
    for tensor in held.values():
        tensor.zero_()  # which is what it was, and no longer anybody's
    restore_optimizer(lifted, moments)
    for optimizer in (whole, lifted):
        walk(optimizer, 2, 3)
    assert all(map(torch.equal, lifted.param_groups[0]["params"], whole.param_groups[0]["params"]))


class OnGpu:
    """A parameter that is said to be on a GPU."""

    is_cuda, device = True, torch.device("cuda", 1)


@pytest.mark.parametrize("paged", [True, False])
def test_the_gpu_has_written_before_its_pages_are_read(paged, monkeypatch):
    parameter, page, waited = OnGpu(), torch.zeros(2), []

    def synchronize(device):
        waited.append(device)
        page.fill_(3)  # which the GPU was still about to write

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    state = {parameter: {"state1": page}} if paged else {}
    optimizer = SimpleNamespace(is_paged=paged, param_groups=[{"params": [parameter]}], state=state)
    assert [tensor.tolist() for tensor in optimizer_tensors(optimizer).values()] == [[3, 3]] * paged
    assert waited == [OnGpu.device] * paged


def test_pages_are_not_turned_on_over_a_state():
    walk(optimizer := in_8_bits(parameters(), paged=False), 1)
    with pytest.raises(AssertionError, match="stays where it is"):
        page_state(optimizer)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "page_optimizer on is of optimizer adamw8bit, and optimizer is adamw. Use optimizer adamw8bit"),
        (["--optimizer", "adamw8bit"], "cpu has none here: it takes a CUDA GPU, and Linux that is not in WSL."),
    ],
)
def test_pages_where_there_are_none_are_told_before_a_model_is_loaded(flags, told, tmp_path, capsys):
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    argv = [str(tmp_path / "toy.py"), *SMALL, "--device", "cpu", "--page-optimizer", "on", *flags]
    assert main([*argv, "--run-dir", str(tmp_path / "run")]) == 2
    assert told in (said := capsys.readouterr().err) and "Traceback" not in said
    assert not (tmp_path / "run").exists()
    assert not has_pages(CPU)


class Driver:
    """CUDA's, of a machine whose second GPU is asked about."""

    def __init__(self, shares, failure):
        self.shares, self.failure = shares, failure

    def cuDeviceGet(self, handle, index):
        handle._obj.value = 70 + index
        return 0

    def cuDeviceGetAttribute(self, told, what, handle):
        assert (what, handle.value) == (89, 71)  # cudaDevAttrConcurrentManagedAccess
        told._obj.value = self.shares
        return self.failure


@pytest.mark.parametrize(("shares", "failure", "found"), [(1, 0, True), (0, 0, False), (1, 3, False)])
def test_the_driver_says_whether_there_are_pages(shares, failure, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver(shares, failure))
    assert has_pages(torch.device("cuda", 1)) is found


def test_without_a_driver_there_are_none(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert not has_pages(torch.device("cuda"))


def test_pages_are_tried(monkeypatch, pages):
    """A GPU's are, which this one is in play."""
    monkeypatch.setattr("grpo.policy.optimizer.has_pages", lambda device: True)
    asked = Config(optimizer="adamw8bit", page_optimizer="on")
    check_optimizer(asked, CPU)
    assert len(pages.made) == 2 == len(pages.sent_for)
    for mode in ("auto", "off"):
        check_optimizer(Config(optimizer="adamw8bit", page_optimizer=mode), CPU)
    assert len(pages.made) == 2
    pages.fewest = math.inf
    with pytest.raises(UserError, match=r"adamw8bit does not work on cpu here: .*makes no pages"):
        check_optimizer(asked, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", KINDS)
def test_a_resumed_run_is_planned_without_its_state_and_may_have_pages_then(
    optimizer, pages, tmp_path, monkeypatch, capsys
):
    """The plan in play has what a GPU's may do: the state that comes back is in pages, and the run what it would be."""
    pages.fewest = 256
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    flags = [*SMALL, "--steps", "4", "--save-every", "2", "--lora-rank", "64", "--optimizer", optimizer]
    assert main([str(tmp_path / "toy.py"), *flags, "--run-dir", str(tmp_path / "run")]) == 0
    whole, (first, last) = metrics_of(tmp_path / "run"), list_checkpoints(tmp_path / "run")
    moments = (last / "optimizer.safetensors").read_bytes()
    seen = []

    def plan(config, policy, *others):
        seen.append(len(policy.optimizer.state))
        if optimizer == "adamw8bit":
            page_state(policy.optimizer)

    monkeypatch.setattr(build, "plan_memory", plan)
    assert not pages.made
    assert main(["--resume", str(first)]) == 0
    assert seen == [0] and bool(pages.made) == (optimizer == "adamw8bit")
    assert metrics_of(tmp_path / "run") == whole
    assert (last / "optimizer.safetensors").read_bytes() == moments
