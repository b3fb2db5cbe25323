"""The vLLM engine on real vLLM: the trainer's memory is what it multiplies by, and so its numbers are the policy's."""

import re
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from grpo_kernels import NF4
from tiny_engines import Letters, batch_of, check_ends, contexts, learn, prompts, rollout, surprise_z, tokens_of
from tiny_models import FUSED, build_policy, write_checkpoint
from torch import Tensor

from grpo import build
from grpo.config import Config
from grpo.errors import UserError
from grpo.rollout import vllm_compat
from grpo.rollout.torch_engine import TorchEngine
from grpo.rollout.vllm_engine import VllmEngine, refusal_in_words

# Architecture, whether embedding and head are one table (None: as the architecture has it), base, temperature. The
# vocabulary of all of them is odd, so that the tables are padded.
CASES = [
    ("qwen3", None, "nf4 dynamic", 0.7),  # some projections in 16 bits
    ("qwen3", None, "nf4", 0.7),  # norms of queries and keys, tied
    ("qwen2", None, "bf16", 1.0),  # biases of q, k and v, untied
    ("llama", None, "float32", 0.7),  # biases everywhere, untied, a table that vLLM gives no name
    ("llama3-rope", True, "nf4", 1.0),
]

# What two orders of summation may differ by.
FLOAT32 = dict(atol=1e-4, rtol=1e-4)


class Built(NamedTuple):
    config: object
    policy: object
    engine: VllmEngine


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def built(request, open_engine, vllm_config):
    name, tied, base, temperature = request.param
    base, *dynamic = base.split()
    config = vllm_config(
        name, tied, base=base, temperature=temperature, quantization="dynamic" if dynamic else "uniform"
    )
    return Built(config, *open_engine(config))


def address(tensor):
    return tensor.data_ptr(), tuple(tensor.shape), tensor.dtype


def test_every_weight_of_vllm_is_the_trainers(built):
    model, theirs = built.policy.model, vllm_compat.inner_model(built.engine.llm).model
    store = built.policy.store
    for index, layer in enumerate(theirs.layers):
        linears = dict(qkv=layer.self_attn.qkv_proj, o=layer.self_attn.o_proj,
                       gate_up=layer.mlp.gate_up_proj, down=layer.mlp.down_proj)  # fmt: skip
        for name, linear in linears.items():
            projection = store[f"{index}.{name}"]
            base = projection.base.packed if isinstance(projection.base, NF4) else projection.base
            assert address(linear.weight) == address(base)
            assert [address(part) for part in (linear.lora_a, *linear.lora_b)] == list(map(address, projection.mirrors))
            assert address(linear.lora_scale) == address(store.scale)
    head = vllm_compat.inner_model(built.engine.llm).lm_head
    assert theirs.embed_tokens.weight.data_ptr() == model.embed.weight.data_ptr()
    assert head.weight.data_ptr() == model.head.data_ptr()
    assert (head.weight.data_ptr() == theirs.embed_tokens.weight.data_ptr()) == (model.head is model.embed.weight)
    assert model.head.shape[0] == 101
    assert head.weight.shape[0] == 128


def sampled_and_scored(built, seed):
    """log p of a rollout's tokens: as they were sampled, as the policy scores them, as the engine scores them."""
    groups = rollout(built.engine, prompts(), 4, seed)
    batch = batch_of(groups, built.config)
    rows = built.engine.logprobs(
        [group.prompt.tokens for group in groups for _ in group.completions], tokens_of(groups)
    )
    by_engine = torch.tensor([p for row in rows for p in row])
    return batch.sampler_logprobs[batch.mask], built.policy.logprobs(batch)[0][batch.mask], by_engine


def assert_agree(built, seed):
    sampled, by_policy, by_engine = sampled_and_scored(built, seed)
    torch.testing.assert_close(sampled, by_policy, **FLOAT32)
    torch.testing.assert_close(by_engine, by_policy, **FLOAT32)
    return by_policy


def test_tokens_are_drawn_from_the_policy(built):
    for seed in range(2):
        assert abs(surprise_z(rollout(built.engine, prompts(), 64, seed), built.policy, built.config)) < 4


@pytest.mark.parametrize("size", [0.1, 0.5])
def test_the_policys_log_probabilities_are_those_that_vllm_samples_by(built, size):
    learn(built.policy, 2, size)
    built.engine.sync()
    assert_agree(built, seed=11)


def test_a_fresh_adapter_and_the_reference_policy_are_the_base_model(built):
    learn(built.policy, 3)
    with built.policy.store.reference():
        built.engine.sync()
        reference = assert_agree(built, seed=12)
    built.policy.store.initialise(built.config.lora_alpha, seed=0)
    built.engine.sync()
    fresh = assert_agree(built, seed=12)
    torch.testing.assert_close(fresh, reference, **FLOAT32)


def test_what_the_trainer_writes_in_place_is_in_the_next_sample(built):
    base = built.policy.store["1.down"].base
    written = base if isinstance(base, Tensor) else base.absmax if base.nested_absmax is None else base.nested_absmax
    for tensor in (written, built.policy.model.head):
        before = assert_agree(built, seed=13)
        kept = tensor.clone()
        tensor.mul_(1.5)
        built.engine.llm.reset_prefix_cache()
        assert not torch.allclose(assert_agree(built, seed=13)[:5], before[:5], atol=1e-2)
        tensor.copy_(kept)
        built.engine.llm.reset_prefix_cache()


def test_greedy_tokens_are_those_of_the_torch_engine(built, monkeypatch):
    limit = built.config.max_completion_tokens
    theirs = TorchEngine(built.policy, Letters(), contexts(prompts()), built.config.temperature)
    theirs.temperature = 1e-4  # it knows no 0, which is vLLM's greedy; vLLM samples at none between 0 and 0.01
    monkeypatch.setattr(built.engine, "config", SimpleNamespace(max_completion_tokens=limit, temperature=0.0))
    assert tokens_of(rollout(built.engine, prompts(), 1, seed=0)) == tokens_of(rollout(theirs, prompts(), 1, seed=0))


def test_completions_end_with_the_stop_token_or_at_the_limit(built):
    learn(built.policy, 4)
    built.engine.sync()
    groups = rollout(built.engine, prompts(), 8, seed=0)
    check_ends(groups, built.config.max_completion_tokens)
    assert {c.policy_version for group in groups for c in group.completions} == {built.policy.version}


def test_a_completion_depends_on_the_seed_and_not_on_who_shares_the_batch(built):
    first, again, other = (tokens_of(rollout(built.engine, prompts(), 4, seed)) for seed in (5, 5, 6))
    assert first == again != other
    assert len(set(map(tuple, first))) > 15  # of 20
    assert tokens_of(rollout(built.engine, prompts(2), 4, seed=5)) == first[:8]


def test_vllms_front_door_gives_what_its_core_gives(built, monkeypatch):
    def everything():
        groups = rollout(built.engine, prompts(), 3, seed=8)
        scores = built.engine.logprobs([g.prompt.tokens for g in groups], [g.completions[0].tokens for g in groups])
        return [(c.tokens, c.finish, c.sampler_logprobs) for g in groups for c in g.completions], scores

    monkeypatch.setattr(built.engine, "run", vllm_compat._CoreRunner(built.engine.llm.llm_engine).run)
    by_core = everything()
    monkeypatch.setattr(built.engine, "run", vllm_compat._PublicRunner(built.engine.llm).run)
    assert everything() == by_core


def test_a_temperature_that_vllm_would_raise_is_refused(open_engine, vllm_config):
    with pytest.raises(UserError, match=r"--temperature is 0\.005.*--engine torch"):
        open_engine(vllm_config(temperature=0.005))


def test_a_cache_too_small_for_one_sequence_is_told_before_vllm_is_built(vllm_config, open_engine):
    config = vllm_config("qwen3", base="nf4", kv_cache_gib=1e-4)
    with pytest.raises(UserError, match=r"--kv-cache-gib is 0\.0001, but one sequence of 160 tokens needs .* GiB"):
        open_engine(config)


def test_the_smallest_cache_that_is_taken_is_enough(vllm_config, open_engine):
    """What vLLM itself asks for is never more than what is asked for here."""
    with pytest.raises(UserError) as refused:
        open_engine(vllm_config("qwen3", base="nf4", kv_cache_gib=1e-4))
    least = float(re.search(r"needs (\S+) GiB", str(refused.value))[1])
    _, engine = open_engine(vllm_config("qwen3", base="nf4", kv_cache_gib=1.03 * least))
    assert len(tokens_of(rollout(engine, prompts(), 2, seed=0))) == 10


def test_heads_that_vllm_has_no_attention_for_are_refused_in_words(tmp_path, open_engine):
    settings = FUSED["qwen3"]()
    settings.hidden_size, settings.head_dim = 128, 16
    source = str(write_checkpoint(tmp_path, settings))
    config = Config(model=source, base="float32", device="cpu", engine="vllm", lora_rank=3, max_completion_tokens=23)
    with pytest.raises(UserError, match=r"vLLM cannot sample from \S+ with an adapter: .*head.*Use --engine torch"):
        open_engine(config)


def test_memory_that_runs_out_while_vllm_starts_is_not_taken_for_a_refusal():
    words = "CUDA out of memory occurred when warming up sampler with 512 dummy requests."
    with pytest.raises(RuntimeError, match="warming up sampler"), refusal_in_words("model"):
        raise RuntimeError(words)


def test_where_the_choice_is_free_pytorch_takes_over_what_vllm_refuses(tmp_path, monkeypatch):
    """As on a GPU, where vLLM is the first choice."""
    monkeypatch.setattr(build, "suits_vllm", lambda config, policy: True)
    settings = FUSED["qwen3"]()
    settings.hidden_size, settings.head_dim = 128, 16
    source = str(write_checkpoint(tmp_path, settings))
    config = Config(model=source, base="float32", device="cpu", lora_rank=3, max_completion_tokens=23)
    notes = []
    engine = build.build_engine(config, build_policy(config), Letters(), contexts(prompts()), 60, notes.append)
    assert isinstance(engine, TorchEngine)
    assert len(notes) == 1 and "head" in notes[0] and "auto" in notes[0]
