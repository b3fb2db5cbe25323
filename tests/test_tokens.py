"""What is recorded of tokens is what the update computed with, and costs the run nothing."""

import pytest
import torch
from tiny_models import build_policy, randomise, reference_logprobs
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from grpo.advantages import ESTIMATORS, assign_advantages
from grpo.loss import build_loss
from grpo.packing import build_packer
from grpo.record import tokens
from grpo.record.tokens import TokenTrace, token_texts


def letters(tokens):
    return "".join(chr(200 + token) for token in tokens)


def updated(config, groups, trace):
    policy = build_policy(config)
    loss = build_loss(config)
    loss = TokenTrace(loss, letters) if trace else loss
    for group in groups:
        group.parts = {"all": group.rewards}
    assign_advantages(groups, ESTIMATORS["grpo"], {"all": 1.0})
    policy.update(build_packer(config, policy.device)(groups), loss, 1e-2, config.epochs)
    return policy, loss


def test_the_tokens_are_those_of_the_forward_and_of_the_backward_pass(tiny_config, checkpoint, groups):
    config = tiny_config(correction_cap=1.5)
    _, trace = updated(config, groups, trace=True)
    records = trace.records(groups)
    assert [(record["group"], record["member"]) for record in records] == [(g, m) for g in (0, 1) for m in range(3)]
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3"), dtype=torch.float64)
    logprobs, entropies = reference_logprobs(model, groups[:2], config.temperature)
    completions = [completion for group in groups[:2] for completion in group.completions]
    lengths = [len(completion.tokens) for completion in completions]
    logprobs, entropies = logprobs.split(lengths), entropies.split(lengths)
    for record, completion, logprob, entropy in zip(records, completions, logprobs, entropies, strict=True):
        assert record["texts"] == [chr(200 + token) for token in completion.tokens]
        gap = logprob.detach() - torch.tensor(completion.sampler_logprobs).double()
        advantage = groups[record["group"]].advantages[record["member"]].item()
        # On the policy's own samples the ratio is 1: what is left is the advantage and the truncated weight.
        for name, expected in {
            "logprob": logprob.detach(), "entropy": entropy.detach(), "gap": gap,
            "weight": advantage * gap.exp().clamp(max=1.5),
        }.items():  # fmt: skip
            torch.testing.assert_close(torch.tensor(record[name]).double(), expected, atol=1e-3, rtol=1e-3)
    assert trace.records(groups) == []


def test_a_run_that_is_listened_to_learns_the_same(tiny_config, groups):
    config = tiny_config(epochs=2, kl_coef=0.1, entropy_coef=0.1, tokens_per_batch=20)
    loud, quiet = (updated(config, groups, trace)[0].store.parameters() for trace in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(loud, quiet, strict=True))


def test_long_completions_are_cut_and_the_first_pass_is_kept(tiny_config, groups, monkeypatch):
    monkeypatch.setattr(tokens, "TRACED_TOKENS", 10)
    config = tiny_config(epochs=2)
    _, trace = updated(config, groups, trace=True)
    records = trace.records(groups)
    assert [len(record["texts"]) for record in records] == [5, 1, 4]
    assert {len(record[name]) for record in records[2:] for name in ("logprob", "gap", "entropy", "weight")} == {4}


def test_a_group_of_many_is_seen_in_some_of_its_members(tiny_config, groups):
    groups[0].completions = [*groups[0].completions, *groups[2].completions, *groups[0].completions[::-1]]
    groups[0].rewards = torch.arange(9.0)
    _, trace = updated(tiny_config(), groups[:1], trace=True)
    records = trace.records(groups[:1])
    assert 2 <= len(records) <= tokens.TRACED_COMPLETIONS


def test_a_clipped_token_has_no_weight(tiny_config, groups):
    config = tiny_config(correction="none", clip_low=0.0, clip_high=0.0, epochs=2)
    policy = build_policy(config)
    for group in groups:
        group.parts = {"all": group.rewards}
    assign_advantages(groups, ESTIMATORS["grpo"], {"all": 1.0})
    [[batch]] = build_packer(config, policy.device)(groups)
    trace = TokenTrace(build_loss(config), letters)
    batch.old_logprobs = policy.read(batch)[0]
    randomise(policy, size=0.5)
    logprobs, entropy = policy.logprobs(batch)
    value, _ = trace(logprobs, entropy, batch)
    torch.autograd.grad(value, policy.store.parameters())
    ratio = (logprobs.detach() - batch.old_logprobs).exp()
    clipped = torch.where(batch.advantages > 0, ratio > 1, ratio < 1) & batch.mask
    written = [weight for record in trace.records(groups) for weight in record["weight"]]
    starts = batch.layout.num_prompt_tokens
    expected = torch.where(clipped, 0.0, ratio * batch.advantages)[starts : starts + len(written)]
    assert 0 < clipped.sum() < batch.mask.sum()
    torch.testing.assert_close(torch.tensor(written), expected, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer whose tokens are bytes and a word, as those that fall back to bytes have it."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581the": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("text", ["plain", "é 你好 🙂🙂", "a\ufffdb"])
def test_letters_of_several_tokens_are_whole_and_words_keep_their_space(bytewise, text):
    encoded = [256, *text.encode(), 256]
    texts = token_texts(bytewise.decode)(encoded)
    assert len(texts) == len(encoded)
    assert "".join(texts).strip() == "the" + text + " the"
    assert texts[-1] == " the"
