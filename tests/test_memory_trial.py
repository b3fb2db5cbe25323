"""The memory plan's trial, where memory is that of CPU tensors, counted as they come and go: what it foretells of a
batch several times its size is what that batch takes."""

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers
from grpo_kernels import logprob_torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo import memory_trial
from grpo.config import Config
from grpo.memory_trial import measure
from grpo.policy import Policy
from grpo.policy.allocator import let_loose
from grpo.policy.load import load_model

CARD = 2**36
BESIDE = 2**20  # bytes of others

# A large vocabulary beside narrow layers, as the smallest of the models that people bring, and the other way round.
SHAPES = {
    "wide_head": dict(hidden_size=32, intermediate_size=64, vocab_size=8192),
    "wide_layers": dict(hidden_size=64, intermediate_size=256, vocab_size=256),
}


class Counted(TorchDispatchMode):
    """Bytes of all tensors that are made inside, as long as they live, in the place of CUDA's allocator."""

    def __init__(self, most=CARD):
        super().__init__()
        self.now = self.highest = 0
        self.most, self.fraction = most, 1.0
        self.living = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor):
                self.take(each.untyped_storage())
        return made

    def take(self, storage):
        if storage._cdata in self.living:
            return
        self.living[storage._cdata] = weakref.finalize(storage, self.give_back, storage._cdata, storage.nbytes())
        self.now += storage.nbytes()
        self.highest = max(self.highest, self.now)
        if self.now > self.fraction * self.most:
            raise torch.OutOfMemoryError("CUDA out of memory, in play")

    def give_back(self, key, size):
        del self.living[key]
        self.now -= size


@contextmanager
def counted(policy, monkeypatch):
    """What the policy holds is counted too, from the first time that it is used."""
    counter = Counted()

    def lowered():
        counter.highest = counter.now

    def share(fraction, device):
        counter.fraction = fraction

    with monkeypatch.context() as patch:
        for name, instead in {
            "empty_cache": lambda: None,
            "memory_allocated": lambda device: counter.now,
            "memory_reserved": lambda device: counter.now,
            "max_memory_allocated": lambda device: counter.highest,
            "reset_peak_memory_stats": lambda device: lowered(),
            "mem_get_info": lambda device: (CARD - BESIDE - counter.now, CARD),
            "set_per_process_memory_fraction": share,
            "get_per_process_memory_fraction": lambda device: 1.0,
            "get_device_properties": lambda device: type("Card", (), {"total_memory": CARD}),
        }.items():
            patch.setattr(torch.cuda, name, instead)
        with counter:
            torch.autograd.grad(policy.logprobs(memory_trial._batch_of(policy, 8, 8))[0].sum(), policy.masters())
            yield counter
        let_loose()
    for each in counter.living.values():
        each.detach()


def policy_of(sizes, folder, layers=6):
    torch.manual_seed(0)
    settings = transformers.Qwen3Config(
        **sizes,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
        eos_token_id=2,
    )
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    config = Config(model=str(folder), base="float32", device="cpu", lora_rank=4)
    return Policy(load_model(config, torch.device("cpu"), 128, note=lambda told: None), config)


@pytest.fixture(scope="module", params=SHAPES)
def policy(request, tmp_path_factory):
    return policy_of(SHAPES[request.param], tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def fewer_tokens_than_on_a_gpu(monkeypatch):
    monkeypatch.setattr(memory_trial, "TRIAL", 512)
    monkeypatch.setattr(memory_trial, "LEAST_TRIAL", 128)


@pytest.mark.parametrize("tokens", [500, 3000])
def test_a_larger_batch_takes_what_a_small_one_foretells(tokens, policy, monkeypatch):
    """More is foretold where the head is so small that the forward pass is at its highest in a layer: what kept layers
    hold is counted beside that, of which the last ones are not there yet."""
    most = 1.03 if len(policy.model.head) > 1000 else 1.25
    layers = len(policy.model.layers)
    with counted(policy, monkeypatch) as counter:
        sizes = measure(policy, 96)
        batch = memory_trial._batch_of(policy, tokens, 96)
        for kept in (0, 1, 2, 5, layers):
            policy.model.treat(["recompute"] * (layers - kept) + ["keep"] * kept)
            before = counter.highest = counter.now
            torch.autograd.grad(policy.logprobs(batch)[0].sum(), policy.masters())
            foretold = sizes.update(len(batch.tokens), kept, 0) - 4 * sizes.parameters  # none are added up here
            share = foretold / (counter.highest - before)
            assert 0.98 < share < most, kept
    assert sizes.others == BESIDE


def test_prompts_that_are_read_take_what_few_tokens_foretell(policy, monkeypatch):
    with counted(policy, monkeypatch) as counter:
        sizes = measure(policy, 96)
        batch = memory_trial._batch_of(policy, 3000, 96)
        before = counter.highest = counter.now
        with torch.no_grad():
            policy.model.hidden(batch)
        assert sizes.read(len(batch.tokens)) == pytest.approx(counter.highest - before, rel=0.03)
        assert sizes.read(len(batch.tokens)) < sizes.update(len(batch.tokens), 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["wide_head"], indirect=True)
def test_logits_of_few_tokens_at_once_take_what_is_foretold(policy, monkeypatch):
    monkeypatch.setattr(logprob_torch, "TORCH_CHUNK_ELEMENTS", {"cpu": 2**22})  # 512 rows, as a GPU has some thousand
    monkeypatch.setattr(memory_trial, "TRIAL", 2048)  # three times as many
    layers = len(policy.model.layers)
    with counted(policy, monkeypatch) as counter:
        sizes = measure(policy, 96)
        small = sizes.with_small_head()
        assert small.head_rows == 256 and small.head_fixed < 0.6 * sizes.head_fixed
        policy.head_rows = small.head_rows
        batch = memory_trial._batch_of(policy, 3000, 96)
        for kept in (0, 5):
            policy.model.treat(["recompute"] * (layers - kept) + ["keep"] * kept)
            before = counter.highest = counter.now
            torch.autograd.grad(policy.logprobs(batch)[0].sum(), policy.masters())
            share = (small.update(len(batch.tokens), kept, 0) - 4 * sizes.parameters) / (counter.highest - before)
            assert 0.98 < share < 1.03, kept


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["wide_layers"], indirect=True)
def test_a_trial_that_a_limit_has_no_place_for_is_done_on_half_the_tokens(policy, monkeypatch):
    with counted(policy, monkeypatch) as counter:
        counter.highest = counter.now
        half = measure(policy, 96)
        taken = counter.highest
        monkeypatch.setattr(memory_trial, "TRIAL", 2 * memory_trial.TRIAL)
        measure(policy, 96)
        assert counter.highest > taken
        counter.highest = counter.now
        within = measure(policy, 96, BESIDE + memory_trial.OF_CUDA_LATER + taken)
        assert counter.highest <= taken
    assert within.head_rows == policy.head_rows == memory_trial.SMALL_HEAD  # which was tried first
    assert within.recomputing == pytest.approx(half.recomputing, rel=0.02)
    assert within.keeping == pytest.approx(half.keeping, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["wide_layers"], indirect=True)
def test_a_limit_below_the_smallest_trial_is_gone_beyond(policy, monkeypatch):
    with counted(policy, monkeypatch) as counter:
        free = measure(policy, 96)
        assert measure(policy, 96, BESIDE + counter.now + 1).update(8000, 1, 0) == free.update(8000, 1, 0)
        assert counter.fraction == 1


def test_logits_of_few_tokens_at_once_change_nothing(policy):
    batch = memory_trial._batch_of(policy, 100, 48)
    found = []
    for rows in (None, 7, 256):
        policy.head_rows = rows
        logprobs, entropy = policy.logprobs(batch)
        found.append([logprobs, entropy, *torch.autograd.grad(logprobs.sum(), policy.masters())])
    policy.head_rows = None
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["wide_layers"], indirect=True)
def test_memory_that_no_trial_fits_is_memory_that_ran_out(policy, monkeypatch):
    with counted(policy, monkeypatch) as counter:
        counter.most = counter.now + 1
        with pytest.raises(torch.OutOfMemoryError):
            measure(policy, 96)


def test_what_kept_layers_take_is_measured_where_they_are_the_highest_moment(policy, monkeypatch):
    """A layer that is computed again has its MLP in parts: of few tokens the room for one is more than a kept layer."""

    def peaks(_policy, batch, kept):
        tokens = len(batch.tokens)
        again, in_kept = 400_000 + 1200 * tokens, 200_000 + (1300 + 400 * (kept - 1)) * tokens
        return 100_000 + (900 + 400 * kept) * tokens, max(again, in_kept if kept else 0)

    with counted(policy, monkeypatch):
        monkeypatch.setattr(memory_trial, "_peaks", peaks)
        sizes = measure(policy, 96)
    for kept in range(7):
        for tokens in (20_000, 200_000):
            foretold = sizes.update(tokens, kept, 0) - 4 * sizes.parameters
            assert foretold == pytest.approx(max(peaks(None, SimpleNamespace(tokens=range(tokens)), kept)), rel=0.001)


@pytest.mark.parametrize("layers", [1, 2])
def test_of_a_model_of_one_or_two_layers_too(layers, tmp_path, monkeypatch):
    policy = policy_of(SHAPES["wide_layers"], tmp_path, layers)
    with counted(policy, monkeypatch) as counter:
        sizes = measure(policy, 96)
        batch = memory_trial._batch_of(policy, 3000, 96)
        for kept in range(layers + 1):
            policy.model.treat(["recompute"] * (layers - kept) + ["keep"] * kept)
            before = counter.highest = counter.now
            torch.autograd.grad(policy.logprobs(batch)[0].sum(), policy.masters())
            share = (sizes.update(len(batch.tokens), kept, 0) - 4 * sizes.parameters) / (counter.highest - before)
            assert 0.98 < share < 1.35, kept
