"""The vLLM engine where its layers cannot be the trainer's, on real vLLM: its own base, the adapter copied to it.

All models here could be shared, so it is made to fail: vLLM is built a second time, after a first in vain.
"""

from typing import NamedTuple

import pytest
import torch
import transformers
from tiny_engines import batch_of, learn, prompts, rollout
from tiny_models import SIZES, VOCABULARY, build_policy, randomise, reference_logprobs, write_checkpoint

from grpo.config import Config
from grpo.errors import UserError
from grpo.loss import build_loss
from grpo.rollout import vllm_lora, vllm_weights
from grpo.rollout.vllm_adapter import AdapterLink, copies_of
from grpo.rollout.vllm_engine import VllmEngine

# Heads of a size that vLLM has attention for on a CPU.
HEADS = SIZES | dict(num_attention_heads=2, num_key_value_heads=1, head_dim=32)
NO_HEAD_SIZE = {name: value for name, value in HEADS.items() if name != "head_dim"}

ARCHITECTURES = {
    # Linears that vLLM packs (q, k and v; gate and up), multipliers of its own.
    "granite": lambda: transformers.GraniteConfig(**NO_HEAD_SIZE, residual_multiplier=0.5, embedding_multiplier=3.0),
    # Both are one linear in the checkpoint already.
    "phi3": lambda: transformers.Phi3Config(**NO_HEAD_SIZE, sliding_window=None),
    # A short window in every other layer, capped logits. (vLLM's attention for CPUs caps its scores coarsely.)
    "gemma2": lambda: transformers.Gemma2Config(
        **HEADS, final_logit_softcapping=5.0, attn_logit_softcapping=None, sliding_window=8
    ),
    # vLLM has no code of its own for it and runs that of transformers, whose class is then for no other test.
    "smollm3": lambda: transformers.SmolLM3Config(**NO_HEAD_SIZE),
    # vLLM has code for this one, but takes no adapter.
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=2, n_positions=256, eos_token_id=2, bos_token_id=1
    ),
    # It does not know this one at all.
    "gpt-neo": lambda: transformers.GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_layers=2, num_heads=2, attention_types=[[["global"], 2]],
        max_position_embeddings=256, eos_token_id=2, bos_token_id=1,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def nothing_is_shared():
    def never(self, loaded):
        raise vllm_weights.NotShareableError("this is a test")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vllm_weights.StandIns, "rows", never)
        yield


@pytest.fixture(scope="session")
def adapter_config(tmp_path_factory):
    """(architecture, overrides) -> a Config over a tiny checkpoint."""
    written = {}

    def build(name, **overrides):
        if name not in written:
            written[name] = str(write_checkpoint(tmp_path_factory.mktemp(name), ARCHITECTURES[name]()))
        defaults = dict(model=written[name], base="float32", device="cpu", engine="vllm", lora_rank=3, lora_alpha=6.0,
                        temperature=0.8, max_completion_tokens=15, mask_truncated=False,
                        learning_rate=1e-2)  # fmt: skip
        return Config(**(defaults | overrides))

    return build


class Built(NamedTuple):
    config: Config
    policy: object
    engine: VllmEngine


@pytest.fixture(scope="module", params=["granite", "phi3", "gemma2", "smollm3"])
def built(request, open_engine, adapter_config):
    config = adapter_config(request.param)
    return Built(config, *open_engine(config))


@pytest.fixture(scope="module")
def granite(open_engine, adapter_config):
    config = adapter_config("granite")
    return Built(config, *open_engine(config))


def assert_samples_are_the_policys(built, seed):
    """The log-probabilities that a rollout brings are the policy's of the same tokens. With a large adapter those of
    transformers in float32 are off by 3e-4 of -8 themselves, against float64."""
    groups = rollout(built.engine, prompts(), 4, seed)
    batch = batch_of(groups, built.config)
    logprobs, _ = built.policy.logprobs(batch)
    torch.testing.assert_close(batch.sampler_logprobs, logprobs, atol=1e-4, rtol=1e-4)
    return batch


def test_zero_adapter(built):
    assert isinstance(built.engine.link, AdapterLink)
    assert built.engine.link.told.endswith("(this is a test)")
    built.policy.store.initialise(built.config.lora_alpha, seed=0)
    built.engine.sync()
    batch = assert_samples_are_the_policys(built, seed=1)
    torch.testing.assert_close(built.policy.logprobs(batch)[0], built.policy.reference_logprobs(batch))


def test_large_random_adapter(built):
    learn(built.policy, seed=2, size=0.3)
    assert built.engine.sync()["sync/gap"] < 1e-4
    batch = assert_samples_are_the_policys(built, seed=2)
    assert (built.policy.logprobs(batch)[0] - built.policy.reference_logprobs(batch)).abs().mean() > 0.1


def test_updates(built):
    randomise(built.policy, seed=3)
    built.engine.sync()
    for step in range(3):
        batch = assert_samples_are_the_policys(built, seed=step)
        built.policy.update([[batch]], build_loss(built.config), built.config.learning_rate)
        measured = built.engine.sync()
        assert measured["sync/gap"] < 1e-4
        assert measured["sync/moved"] > 1e-3
    assert_samples_are_the_policys(built, seed=3)


def test_every_linear_has_its_place_and_keeps_it(built):
    """After all those syncs and rollouts vLLM still reads the memory that is written to, a piece of it for each."""
    link = built.engine.link
    assert [copy.name for copy in link.copies] == [name for name, _, _ in built.policy.store.factors()]
    find = vllm_lora.find_lora_slices(built.engine.llm, link.lora_request.lora_int_id)
    for copy in link.copies:
        [place] = find(copy.name)
        assert (place.a.data_ptr(), place.b.data_ptr()) == (copy.to_a.data_ptr(), copy.to_b.data_ptr())
    for places in ([copy.to_a for copy in link.copies], [copy.to_b for copy in link.copies]):
        assert len({place.data_ptr() for place in places}) == len(link.copies)
    assert not link.lora_request.load_inplace


def test_building_the_engine_leaves_the_masters_alone(granite):
    """vLLM multiplies by the scale, in place, whatever adapter it is handed; here it is 2."""
    untouched = build_policy(granite.config)
    randomise(untouched)
    randomise(granite.policy)
    granite.engine.sync()
    for ours, expected in zip(granite.policy.store.parameters(), untouched.store.parameters(), strict=True):
        assert torch.equal(ours, expected)


def test_the_canary_trips_when_the_adapter_is_not_copied(granite, monkeypatch):
    learn(granite.policy, seed=4)
    granite.engine.sync()
    learn(granite.policy, seed=5)
    with monkeypatch.context() as patched:
        patched.setattr(granite.engine.link, "push", lambda: None)
        with pytest.raises(UserError, match="is not the policy"):
            granite.engine.sync()
    assert granite.engine.sync()["sync/gap"] < 1e-4


def test_the_canary_trips_when_one_linear_is_not_copied(granite, monkeypatch):
    link = granite.engine.link
    first_layer = [copy for copy in link.copies if ".layers.0." in copy.name]
    assert len(first_layer) == 7
    for seed, left_out in enumerate(first_layer, start=6):
        learn(granite.policy, seed)
        with monkeypatch.context() as patched:
            patched.setattr(link, "copies", [copy for copy in link.copies if copy is not left_out])
            with pytest.raises(UserError, match="is not the policy"):
                granite.engine.sync()
    assert granite.engine.sync()["sync/gap"] < 1e-4


def test_scale_zero_samples_from_the_base_model(granite):
    learn(granite.policy, seed=13)
    with granite.policy.store.reference():
        granite.engine.take_up()
        groups = rollout(granite.engine, prompts(), 2, seed=0)
    batch = batch_of(groups, granite.config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(granite.config.model).eval()
    expected, _ = reference_logprobs(theirs, groups, granite.config.temperature)
    torch.testing.assert_close(batch.sampler_logprobs[batch.mask].double(), expected, atol=1e-4, rtol=0)
    granite.engine.sync()
    assert_samples_are_the_policys(granite, seed=1)


def test_a_linear_that_vllm_keeps_in_slices_has_all_of_a_and_its_rows_of_b_in_each():
    generator = torch.Generator().manual_seed(0)
    a, b, x = (torch.randn(shape, generator=generator) for shape in ((3, 7), (11, 3), (5, 7)))
    slices = [vllm_lora.LoraSlice(torch.zeros(8, 7), torch.zeros(rows, 8)) for rows in (2, 8, 1)]
    for copy in copies_of("fused", a, b, slices):
        copy.to_a.copy_(copy.a)
        copy.to_b.copy_(copy.b)
    theirs = torch.cat([x @ part.a.T @ part.b.T for part in slices], dim=1)
    torch.testing.assert_close(theirs, x @ a.T @ b.T)


def test_a_linear_that_vllm_has_no_place_for_is_named(granite, monkeypatch):
    [*_, projection] = granite.policy.store.projections.values()
    monkeypatch.setattr(projection, "names", ["model.layers.1.mlp.elsewhere"])
    with pytest.raises(UserError, match=r"no adapter on model\.layers\.1\.mlp\.elsewhere \(64 rows of 96 inputs\)"):
        AdapterLink(granite.policy).attach(granite.engine.llm)


REFUSAL = r"^vLLM cannot sample from \S+ with an adapter: [^.]*{}[^.]*\. Use --engine torch\.$"


def test_an_architecture_that_vllm_does_not_know_is_refused(adapter_config, open_engine):
    with pytest.raises(UserError, match=REFUSAL.format("'GPTNeoForCausalLM'. are not supported")):
        open_engine(adapter_config("gpt-neo"))


def test_after_an_architecture_without_lora_is_refused_another_engine_can_be_built(adapter_config, open_engine):
    with pytest.raises(UserError, match=REFUSAL.format("does not support LoRA")):
        open_engine(adapter_config("gpt2"))
    config = adapter_config("phi3")
    assert_samples_are_the_policys(Built(config, *open_engine(config)), seed=0)


@pytest.mark.parametrize("base", ["nf4", "bf16"])
def test_a_base_that_vllm_would_not_round_alike_is_refused(base, adapter_config):
    policy = build_policy(adapter_config("granite", base=base))
    with pytest.raises(UserError, match=rf"--base {base}.*--base float32 or --engine torch"):
        AdapterLink(policy)


@pytest.mark.parametrize("rank, room", [(1, 1), (3, 8), (8, 8), (9, 16), (65, 128), (257, 320)])
def test_memory_is_laid_out_for_the_next_rank(rank, room, adapter_config):
    assert AdapterLink(build_policy(adapter_config("granite", lora_rank=rank))).arguments["max_lora_rank"] == room


def test_a_rank_beyond_what_vllm_takes_is_refused(adapter_config):
    policy = build_policy(adapter_config("granite", lora_rank=513))
    with pytest.raises(UserError, match="--lora-rank is 513, and vLLM takes 512 at most"):
        AdapterLink(policy)
