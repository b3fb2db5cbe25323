"""TorchEngine: the policy's own model generates, batched, with a key/value cache. The default on a CPU and the
reference that other engines are tested against. Knows nothing of rewards or gradients.

A decoder holds the state of the sequences being written; there is one for models that run packed (`PackedDecoder`)
and one for any other Hugging Face model (`PaddedDecoder`). Both give the hidden state that predicts the next token
of each sequence, [S, D]; the engine turns it into tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from grpo_kernels.attention import GroupLayout
from torch import Tensor
from transformers import DynamicCache

from grpo.policy import Policy
from grpo.policy.fused import FusedModel
from grpo.policy.generic import GenericModel
from grpo.rollout.canary import Canary
from grpo.rollout.engine import completion_of, in_groups
from grpo.seeds import mix_seed
from grpo.types import Group, Prompt

# Sequences written at once; more are done in turns.
MAX_SEQUENCES = 512

# Each token of a canary completion is a step of its own, and a small model's step is mostly overhead. Two are enough
# to go through prompt, cache and head once: this engine multiplies by the policy's own tensors.
CANARY_PROMPTS, CANARY_TOKENS = 1, 2

# Finished sequences are dropped when they are at least this share of the computation: dropping copies the cache.
DROP_SHARE = 0.25


class TorchEngine:
    """Samples from a Policy in this process; its weights are the policy's, so a sync has nothing to copy."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        prompts: list[Prompt],
        max_completion_tokens: int,
        temperature: float,
    ):
        """prompts: where the canary's are taken from."""
        self.policy, self.tokenizer = policy, tokenizer
        self.max_completion_tokens, self.temperature = max_completion_tokens, temperature
        self.stop_tokens = set(policy.stop_tokens)
        chosen = prompts[:CANARY_PROMPTS]
        # Written by the base model, so that a resumed run has the canary of the uninterrupted one.
        with policy.store.reference():
            groups = self._write(chosen, 1, min(CANARY_TOKENS, max_completion_tokens), seed=0)
        self.canary = Canary(policy, self.score, chosen, [group.completions[0].tokens for group in groups])

    def rollout(self, prompts: list[Prompt], group_size: int, seed: int) -> list[Group]:
        """See Engine.rollout."""
        at_once = max(1, MAX_SEQUENCES // group_size)
        groups: list[Group] = []
        for start in range(0, len(prompts), at_once):
            part = prompts[start : start + at_once]
            groups += self._write(part, group_size, self.max_completion_tokens, mix_seed(seed, start))
        return groups

    @torch.no_grad()
    def score(self, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """See Engine.score. Goes through the cache token by token, as sampling does."""
        longest = max(map(len, completions))
        decoder = self._decoder()
        hidden = decoder.start(prompts, 1, longest)
        scored = []
        for place in range(longest):
            # A sequence that is already at its end is fed its first token again; what comes out is not looked at.
            tokens = torch.tensor([c[place] if place < len(c) else c[0] for c in completions], device=hidden.device)
            scored.append(self._logprobs(hidden).gather(1, tokens[:, None]).squeeze(1))
            hidden = decoder.step(tokens) if place + 1 < longest else hidden
        rows = torch.stack(scored, dim=1).tolist()
        return [row[: len(completion)] for row, completion in zip(rows, completions, strict=True)]

    def sync(self) -> dict[str, float]:
        """See Engine.sync."""
        return self.canary.check()

    def release(self) -> None:
        """See Engine.release. Nothing is held between rollouts."""

    def close(self) -> None:
        """See Engine.close."""

    @torch.no_grad()
    def _write(self, prompts: list[Prompt], group_size: int, max_tokens: int, seed: int) -> list[Group]:
        """Sample until every completion has stopped or is `max_tokens` long."""
        generator = torch.Generator(self.policy.device).manual_seed(seed)
        decoder = self._decoder()
        hidden = decoder.start([prompt.tokens for prompt in prompts], group_size, max_tokens)
        drafts = [_Draft() for _ in range(len(prompts) * group_size)]
        rows = list(drafts)  # the draft that each row of the decoder writes
        for place in range(max_tokens):
            logprobs = self._logprobs(hidden)  # [rows, V]
            tokens = torch.multinomial(logprobs.exp(), 1, generator=generator)
            chosen = logprobs.gather(1, tokens).squeeze(1).tolist()
            for draft, token, logprob in zip(rows, tokens.squeeze(1).tolist(), chosen, strict=True):
                draft.append(token, logprob, self.stop_tokens)
            going = [row for row, draft in enumerate(rows) if not draft.stopped]
            if not going or place + 1 == max_tokens:
                break
            if len(going) <= (1 - DROP_SHARE) * len(rows):
                decoder.keep(going)
                rows, tokens = [rows[row] for row in going], tokens[going]
            hidden = decoder.step(tokens.squeeze(1))
        version = self.policy.version
        completions = [completion_of(d.tokens, d.logprobs, d.stopped, self.tokenizer, version) for d in drafts]
        return in_groups(prompts, group_size, completions)

    def _logprobs(self, hidden: Tensor) -> Tensor:
        """log p at the sampling temperature of every token, float32: [S, D] -> [S, V]."""
        model = self.policy.model
        logits = float32_product(hidden, model.head)
        if model.softcap is not None:
            logits = model.softcap * torch.tanh(logits / model.softcap)
        return torch.log_softmax(logits / self.temperature, dim=-1)

    def _decoder(self) -> Decoder:
        model = self.policy.model
        return PackedDecoder(model) if isinstance(model, FusedModel) else PaddedDecoder(model)


def float32_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [S, D] times weight [V, D], accumulated and returned in float32 as in `linear_logprob`."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


@dataclass
class _Draft:
    """A completion being written. What is sampled after its stop token is thrown away."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False

    def append(self, token: int, logprob: float, stop_tokens: set[int]) -> None:
        if not self.stopped:
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self.stopped = token in stop_tokens


class Decoder(Protocol):
    """The state of S sequences being written."""

    def start(self, prompts: list[list[int]], copies: int, room: int) -> Tensor:
        """Read the prompts, each for `copies` sequences of at most `room` tokens; the last hidden states [S, D]."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """One more token for each sequence, [S] -> hidden states [S, D]."""
        ...

    def keep(self, rows: list[int]) -> None:
        """Go on with these sequences only."""
        ...


class PackedDecoder:
    """Prompts packed and read once each; then one token a sequence over a KeyValueCache."""

    def __init__(self, model: FusedModel):
        self.model = model

    def start(self, prompts: list[list[int]], copies: int, room: int) -> Tensor:
        """See Decoder.start."""
        device = self.model.head.device
        layout = GroupLayout.of([len(prompt) for prompt in prompts], device=device)
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        hidden, self.cache = self.model.prefill(tokens, layout, copies, room)
        return hidden[layout.prompts[1:].long() - 1].repeat_interleave(copies, dim=0)

    def step(self, tokens: Tensor) -> Tensor:
        """See Decoder.step."""
        return self.model.decode(tokens, self.cache)

    def keep(self, rows: list[int]) -> None:
        """See Decoder.keep."""
        self.cache.keep(rows)


class PaddedDecoder:
    """Any Hugging Face model: prompts padded at their start, its own cache."""

    def __init__(self, model: GenericModel):
        self.model = model.model

    def start(self, prompts: list[list[int]], copies: int, room: int) -> Tensor:
        """See Decoder.start."""
        device = self.model.device
        longest = max(map(len, prompts))
        rows = [prompt for prompt in prompts for _ in range(copies)]
        tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        self.mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        self.cache = DynamicCache(config=self.model.config)
        return self._run(tokens, (self.mask.cumsum(1) - 1).clamp(min=0))

    def step(self, tokens: Tensor) -> Tensor:
        """See Decoder.step."""
        positions = self.mask.sum(1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(positions)], dim=1)
        return self._run(tokens[:, None], positions)

    def keep(self, rows: list[int]) -> None:
        """See Decoder.keep."""
        index = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask[index]
        self.cache.batch_select_indices(index)

    def _run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        out = self.model.base_model(
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.last_hidden_state[:, -1]
