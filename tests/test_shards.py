"""A base in parts: every rank computes, bit for bit, what it computes over the whole base, whatever passes the others
make meanwhile; and holds a part of it. Ranks are threads here; processes are in test_ranks_sharded.py."""

import gc
import random
import threading
from dataclasses import replace

import pytest
import torch
import transformers
from threaded_ranks import Table, Thread, together
from tiny_models import CPU, NO_HEAD_SIZE, randomise, write_checkpoint

from grpo.config import Config
from grpo.errors import UserError
from grpo.fitting import Fitting
from grpo.loss import build_loss
from grpo.packing import batch_limit, build_packer
from grpo.policy import Policy, load_model
from grpo.policy.shards import tensors_of
from grpo.world import ALONE

LAYERS = 5  # an odd number, so that a pass begins in the buffer that the one before ended in
TREATMENTS = ("keep", "recompute", "offload")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = transformers.Qwen2Config(**NO_HEAD_SIZE | {"num_hidden_layers": LAYERS})
    return str(write_checkpoint(tmp_path_factory.mktemp("five"), config, vary_norms=True))


def config_of(model, **fields):
    fields = dict(base="nf4", device="cpu", lora_rank=3, engine="none", method="sft", shard_base=True) | fields
    return Config(model=model, **fields)


LOADING = threading.Lock()  # transformers changes what is everybody's while it loads


def build(config, world=ALONE):
    with LOADING:
        loaded = load_model(config, CPU, 64, note=lambda told: None, world=world)
    policy = Policy(loaded, config, world)
    randomise(policy)
    return policy


def batches_of(groups, config, count):
    """Some batches, no two alike."""
    for group in groups:
        group.advantages = torch.linspace(-1, 1, len(group.completions))
    packed = [
        build_packer(replace(config, method="grpo", engine="server", servers=("http://a:1",)), CPU)([group])[0]
        for group in groups
    ]
    return [batch for [batch] in packed][:count]


def gradient(policy, batch, loss):
    policy.backward(batch, loss)
    found = torch.cat([master.grad.flatten() for master in policy.masters()])
    policy.optimizer.zero_grad()
    return found


BASES = {
    "nf4": {},
    "double": {"double_quant": "on"},
    "bf16": {"base": "bf16"},
    "float32": {"base": "float32"},
}


QUICK, *SLOW = [("float32", 2), ("nf4", 2), ("double", 3), ("bf16", 3)]


@pytest.mark.parametrize(("base", "size"), [QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)])
def test_each_rank_computes_what_it_computes_over_the_whole_base(base, size, model, groups):
    """Other batches on each rank, one more than the rank before, the first none; each treatment of the layers."""
    config = config_of(model, **BASES[base])
    alone, loss = build(config), build_loss(config)
    batches = batches_of(groups, config, size)
    expected = [(alone.read(batch)[0], gradient(alone, batch, loss)) for batch in batches]

    def work(world):
        policy, found = build(config, world), []
        for treatment in TREATMENTS:
            policy.model.treat([treatment] * (LAYERS - 1) + ["keep"])
            own = [(policy.read(batch)[0], gradient(policy, batch, loss)) for batch in batches[: world.rank]]
            found += zip(own, expected, strict=False)
            world.gather(None)
        return found

    for rank, found in enumerate(together(size, work)):
        assert len(found) == len(TREATMENTS) * rank
        for (logprobs, grad), (its_logprobs, its_grad) in found:
            assert torch.equal(logprobs, its_logprobs) and torch.equal(grad, its_grad)


@pytest.mark.slow
def test_any_passes_in_any_order_between_two_meetings(model, groups):
    """Passes with and without gradient, forward passes that nothing follows, failures half-way through a layer."""
    config, size = config_of(model), 3
    alone, loss = build(config), build_loss(config)
    batches = batches_of(groups, config, 3)
    logprobs = [alone.read(batch)[0] for batch in batches]
    gradients = [gradient(alone, batch, loss) for batch in batches]

    class Trouble(Exception):
        pass

    def work(world):
        policy, draws = build(config, world), random.Random(world.rank)
        troubled = []

        def in_trouble(module, arguments):
            if troubled and troubled[0] == module.index:
                troubled.clear()
                raise Trouble

        for layer in policy.model.layers:
            layer.register_forward_pre_hook(in_trouble)
        for _ in range(6):
            for _ in range(draws.randrange(4)):
                index, kind = draws.randrange(3), draws.randrange(4)
                policy.model.treat(draws.choices(TREATMENTS, k=LAYERS))
                if kind == 0:
                    assert torch.equal(policy.read(batches[index])[0], logprobs[index])
                elif kind == 1:
                    assert torch.equal(gradient(policy, batches[index], loss), gradients[index])
                elif kind == 2:
                    assert torch.equal(policy.logprobs(batches[index])[0].detach(), logprobs[index])
                else:  # in the forward pass or, where the layer is computed again, perhaps in the backward pass
                    troubled[:] = [draws.randrange(LAYERS)]
                    with pytest.raises(Trouble):
                        gradient(policy, batches[index], loss)
            assert world.gather(world.rank) == list(range(size))
        return world.collected

    assert len(set(together(size, work))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_batch_that_memory_does_not_hold_on_one_rank_is_halved_there(when, model, groups):
    config = config_of(model)
    alone, loss = build(config), build_loss(config)
    [batch, other] = batches_of(groups, config, 2)
    expected = gradient(alone, batch, loss), gradient(alone, other, loss)

    def work(world):
        policy, told = build(config, world), []
        policy.fit = Fitting(batch_limit(config), told.append)
        policy.model.treat(["recompute"] * LAYERS)
        runs = []

        def full(module, arguments):
            runs.append(torch.is_grad_enabled())
            # A recomputed layer is run again within its backward pass, from the last to the first.
            if world.rank == 0 and len(runs) == (3 if when == "forward" else LAYERS + 2):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

        for layer in policy.model.layers:
            layer.register_forward_pre_hook(full)
        policy.fit(lambda part: policy.backward(part, loss), [batch, other][world.rank])
        world.gather(None)
        return torch.cat([master.grad.flatten() for master in policy.masters()]), told

    (first, told), (second, silent) = together(2, work)
    assert len(told) == 1 and not silent
    torch.testing.assert_close(first, expected[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(second, expected[1])


@pytest.mark.slow
def test_a_rank_holds_its_part_of_the_base_and_two_layers(model):
    """Measured: the bytes of all tensors that are alive after a load, less those before."""

    def in_use():
        gc.collect()
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device == CPU}
        return sum(held.values())

    def taken(world, **fields):
        before = in_use()
        loaded = load_model(config_of(model, **fields), CPU, 64, note=lambda told: None, world=world)
        return in_use() - before, loaded

    for base in BASES.values():
        whole, loaded = taken(ALONE, **base)
        of_layers = sum(t.nbytes for each in loaded.store.projections.values() for t in tensors_of(each.base))
        beside = whole - of_layers  # embedding, head, norms, adapter
        for size, rank in ((2, 0), (5, 4)):
            of_rank, kept = taken(Thread(rank, Table(size)), **base)
            padding = 2 * LAYERS * 256 * (8 + size)  # each tensor begins at a multiple of 256, so does each part
            assert 0 <= of_rank - beside - of_layers / size - 2 * of_layers / LAYERS <= padding
            assert kept.store.shared_by == size
            del kept


def test_what_the_buffers_hold_is_not_gathered_again(model, groups):
    config = config_of(model)
    [batch] = batches_of(groups, config, 1)
    loss = build_loss(config)

    def work(world):
        policy, counts = build(config, world), []
        for work in (lambda: gradient(policy, batch, loss), lambda: policy.read(batch), lambda: policy.read(batch)):
            before = world.collected
            work()
            counts.append(world.collected - before)
        return counts

    # Up through 5 layers and down through the 3 that are gone; up through the 3 that are gone; through all, as the
    # last two are there and the first come into their buffers.
    assert together(2, work) == [[8, 3, 5]] * 2


def test_a_backward_pass_that_is_not_of_the_last_forward_pass_is_no_silent_mistake(model, groups):
    config = config_of(model)
    first, second = batches_of(groups, config, 2)

    def work(world):
        policy = build(config, world)
        early = policy.logprobs(first)[0].sum()
        late = policy.logprobs(second)[0].sum()
        with pytest.raises(RuntimeError, match="its own backward pass, once"):
            early.backward()
        late.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="its own backward pass, once"):
            late.backward()

    together(2, work)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"engine": "auto"}, "--engine auto would sample .* Use --engine server"),
        ({"engine": "torch"}, "--engine torch would sample .* sft and dpo do without, by --engine none"),
        ({"quantization": "dynamic"}, "--quantization uniform"),
        ({"model": "starcoder2"}, "a Starcoder2ForCausalLM, whose layers are not"),
        ({"model": "qwen3-moe"}, "a Qwen3MoeForCausalLM, whose layers are not"),
    ],
)
def test_what_cannot_be_in_parts_is_refused(fields, told, model, checkpoint):
    fields = fields | {"model": checkpoint(fields["model"])} if "model" in fields else fields
    config = config_of(**{"model": model} | fields)
    with pytest.raises(UserError, match=told):
        load_model(config, CPU, 64, note=lambda told: None, world=Thread(0, Table(2)))


def test_one_process_by_itself_has_the_whole_base(model):
    told = []
    sharded, whole = (load_model(config_of(model, shard_base=on), CPU, 64, note=told.append) for on in (True, False))
    assert sharded.store.shared_by == 1
    assert [each for each in told if "--shard-base" in each] == [told[0]]
    for one, other in zip(sharded.store.projections.values(), whole.store.projections.values(), strict=True):
        assert all(map(torch.equal, tensors_of(one.base), tensors_of(other.base)))


def test_scales_stay_as_they_were_cut(model):
    """The memory plan may quantise the scales of a whole base once it stands."""
    loaded = load_model(config_of(model), CPU, 64, note=lambda told: None, world=Thread(1, Table(2)))
    assert loaded.store.spared_by_double_quant == 0
    assert load_model(config_of(model), CPU, 64, note=print).store.spared_by_double_quant > 0
