"""What vLLM makes of other families than Llama's, on real vLLM: its layers are the trainer's memory, found out while it
loads, and its numbers are the policy's."""

from types import SimpleNamespace

import pytest
import torch
from grpo_kernels import rows
from grpo_kernels.nf4 import nf4_quantize
from tiny_engines import Letters, batch_of, contexts, learn, prompts, rollout, tokens_of
from tiny_models import FUSED, GENERIC, MIXTURES, build_policy, randomise, write_checkpoint
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from grpo.config import Config
from grpo.errors import UnsuitedEngine, UserError
from grpo.policy.fused import FusedModel
from grpo.policy.projections import Projection, ProjectionStore
from grpo.rollout import vllm_compat, vllm_weights
from grpo.rollout.torch_engine import TorchEngine
from grpo.rollout.vllm_engine import SharedLink, VllmEngine
from grpo.rollout.vllm_weights import NotShareableError, Rows, StandIns, joined

# Family, base. What is generic has a projection for each linear, of which vLLM joins several.
CASES = [
    ("gemma", "float32"),  # a table that asks for no method; the head is tied to it
    ("gemma2", "nf4"),
    ("gemma3", "bf16"),
    ("gemma3-sees", "nf4"),  # the part for text of a larger model
    ("phi3", "nf4"),  # joined in the checkpoint
    ("glm4", "nf4"),
    ("stablelm", "bf16"),
    ("mistral-window", "float32"),
    ("granite", "nf4"),  # multipliers of embedding, blocks and logits
    ("cohere", "float32"),  # both blocks of a layer read the same
    ("cohere2", "nf4"),  # that, windows, and a layer without positions
    ("exaone4", "bf16"),
    ("gpt2", "nf4"),  # generic, transposed in the checkpoint, and without LoRA of vLLM's own
    ("starcoder2", "float32"),  # generic, and run by vLLM through the code of transformers
    ("olmo2", "nf4"),  # through the code of transformers, and fused here
    ("glm", "bf16"),
]


# The window of vLLM's Cohere 2 is a token longer than that of transformers: they are one model up to that length only.
WITHIN_WINDOW = dict(sliding_window=64)


def config_of(folder, name, base, **settings_more):
    settings = (FUSED | GENERIC | MIXTURES)[name]()
    if name == "gpt2":
        settings.n_head = 2  # heads of a size that vLLM has attention for on a CPU
    else:
        text = settings.get_text_config()
        text.hidden_size = 128
        if name == "deepseek-v2":  # heads of a size that vLLM has attention for
            text.qk_nope_head_dim, text.qk_rope_head_dim, text.v_head_dim = 16, 16, 32
        else:
            text.head_dim = 32
    for key, value in settings_more.items():
        setattr(settings, key, value)
    write_checkpoint(folder, settings, vary_norms=True)
    fields = dict(base=base, device="cpu", engine="vllm", lora_rank=3, lora_alpha=6.0, max_completion_tokens=23)
    return Config(model=str(folder), mask_truncated=False, **fields)


@pytest.mark.parametrize(("name", "base"), CASES)
def test_shared_and_the_same(name, base, tmp_path, monkeypatch):
    config = config_of(tmp_path, name, base, **(WITHIN_WINDOW if name == "cohere2" else {}))
    policy, notes = build_policy(config), []
    assert isinstance(policy.model, FusedModel) == (name in FUSED)
    randomise(policy)
    engine = VllmEngine(policy, Letters(), contexts(prompts()), config, 160, notes.append)
    try:
        assert isinstance(engine.link, SharedLink)
        assert notes == ["vllm: samples from the trainer's own weights, base and adapter"]
        learn(policy, 2)
        assert engine.sync()["sync/gap"] < 1e-5  # the canary
        batch = batch_of(rollout(engine, prompts(), 4, seed=1), config)
        torch.testing.assert_close(batch.sampler_logprobs, policy.logprobs(batch)[0], atol=1e-4, rtol=1e-4)
        assert (policy.logprobs(batch)[0] - policy.reference_logprobs(batch)).abs().mean() > 1e-3
        theirs = TorchEngine(policy, Letters(), contexts(prompts()), config.temperature)
        theirs.temperature = 1e-4  # it knows no 0, which is vLLM's greedy
        monkeypatch.setattr(engine, "config", SimpleNamespace(max_completion_tokens=23, temperature=0.0))
        greedy = tokens_of(rollout(engine, prompts(), 1, seed=0))
        assert greedy == tokens_of(rollout(theirs, prompts(), 1, seed=0))
    finally:
        engine.close()


@pytest.mark.parametrize(("name", "base"), [("llama", "nf4"), ("phi3", "float32"), ("stablelm", "bf16")])
def test_an_embedding_in_the_hosts_memory_is_read_there(name, base, tmp_path, monkeypatch):
    """As on a GPU, but that there the policy's rows come from where vLLM's do."""
    config = config_of(tmp_path, name, base, tie_word_embeddings=False)
    policy, read = build_policy(config), []
    randomise(policy)
    monkeypatch.setattr(vllm_weights, "is_hosted", lambda model: True)
    take = rows.take_rows
    monkeypatch.setattr(rows, "take_rows", lambda index, table: read.append(table.data_ptr()) or take(index, table))
    engine = VllmEngine(policy, Letters(), contexts(prompts()), config, 160)
    try:
        [layer] = [
            each for each in vllm_compat.inner_model(engine.llm).modules() if type(each) is VocabParallelEmbedding
        ]
        assert layer.weight.untyped_storage().nbytes() == layer.weight.itemsize
        learn(policy, 2)
        assert engine.sync()["sync/gap"] < 1e-5  # the canary
        batch = batch_of(rollout(engine, prompts(), 4, seed=1), config)
        torch.testing.assert_close(batch.sampler_logprobs, policy.logprobs(batch)[0], atol=1e-4, rtol=1e-4)
        assert set(read) == {policy.model.embed.weight.data_ptr()}
    finally:
        engine.close()


def test_another_window_than_the_policys_is_told_before_anything_is_trained(tmp_path):
    config = config_of(tmp_path, "cohere2", "float32")  # with a window that is shorter than the prompts
    with pytest.raises(UserError, match="The rollout engine is not the policy"):
        VllmEngine(build_policy(config), Letters(), contexts(prompts()), config, 160, [].append)


def test_what_cannot_be_shared_is_sampled_by_an_adapter_or_refused_with_the_reason(tmp_path, monkeypatch):
    def never(self, loaded):
        raise NotShareableError("this is a test")

    monkeypatch.setattr(vllm_weights.StandIns, "rows", never)
    config = config_of(tmp_path, "phi3", "nf4")
    policy = build_policy(config)
    with pytest.raises(UnsuitedEngine, match=r"cannot share the layers of \S+ \(this is a test\), so .* --base nf4 is"):
        VllmEngine(policy, Letters(), contexts(prompts()), config, 160)
    # A next engine would take its process groups: one with experts needs others.
    assert not torch.distributed.is_initialized()


# ---- which rows a layer holds


def store_of(*sizes, columns=64, nf4=False, rank=2):
    store = ProjectionStore()
    generator = torch.Generator().manual_seed(0)
    for number, parts in enumerate(sizes):
        base = torch.randn(sum(parts), columns, generator=generator)
        names = [f"{number}.{part}" for part in range(len(parts))]
        projection = Projection(nf4_quantize(base) if nf4 else base, None, names, list(parts), rank, torch.float32)
        store.add(f"{number}", projection)
    store.initialise(4.0, seed=0)
    randomise(SimpleNamespace(store=store))
    return store


@pytest.mark.parametrize("nf4", [False, True])
def test_rows_of_a_projection_are_what_its_forward_gives_there(nf4):
    store = store_of((8, 4, 4), nf4=nf4)
    [projection] = store.projections.values()
    x = torch.randn(5, 64)
    expected = projection(x)
    for start, stop in ((0, 16), (0, 8), (8, 16), (2, 11), (12, 13)):
        layer = torch.nn.Module()
        vllm_weights._hold(layer, Rows(projection, start, stop), store)
        torch.testing.assert_close(vllm_weights._multiply(layer, x, None), expected[:, start:stop])


def test_a_stand_in_is_known_transposed_and_in_pieces():
    store = store_of((8, 4), (6,))
    first, second = store.projections.values()
    for transposed in (False, True):
        stand_ins = StandIns(store, transposed)
        views = {name: tensor.t() if transposed else tensor for name, tensor in stand_ins.named}
        assert views["0.1.weight"].shape == (4, 64)
        assert stand_ins.rows(views["0.1.weight"]) == Rows(first, 8, 12)
        assert stand_ins.rows(views["1.0.weight"][2:5]) == Rows(second, 2, 5)
        with pytest.raises(NotShareableError, match="not by their rows"):
            stand_ins.rows(views["0.0.weight"][:, :32])
        with pytest.raises(NotShareableError, match="not by their rows"):
            stand_ins.rows(views["0.0.weight"][::2])


def test_rows_that_follow_each_other_are_one_piece():
    first, second = store_of((8, 4), (6,)).projections.values()
    pieces = [Rows(first, 0, 8), Rows(first, 8, 12), Rows(second, 0, 3), Rows(first, 2, 4), Rows(second, 3, 6)]
    assert joined(pieces) == [Rows(first, 0, 12), *pieces[2:]]


def test_a_row_that_nobody_holds_is_told():
    store = store_of((8, 4))
    [projection] = store.projections.values()
    for pieces in ([Rows(projection, 0, 8)], [Rows(projection, 0, 12), Rows(projection, 3, 4)], []):
        with pytest.raises(NotShareableError, match=r"do not hold each row of 0\.0, 0\.1 once"):
            vllm_weights._check_all_are_held(store, pieces)
    vllm_weights._check_all_are_held(store, [Rows(projection, 5, 12), Rows(projection, 0, 5)])
