"""TorchEngine: the policy's own model generates, batched, with a key/value cache. The default on a CPU and the
reference that other engines are tested against. Knows nothing of rewards or gradients.

A decoder holds the state of the sequences being written; there is one for models that run packed (`PackedDecoder`)
and one for any other Hugging Face model (`PaddedDecoder`). Both give the hidden state that predicts the next token
of each sequence, [S, D]; the engine turns it into tokens.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from grpo_kernels.layout import GroupLayout
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from grpo.policy import Policy
from grpo.policy.fused import FusedModel
from grpo.policy.generic import GenericModel, body_of
from grpo.policy.routing import experts_in, together, watched
from grpo.rollout.canary import build_canary
from grpo.rollout.engine import Finished, completion_of, nobody
from grpo.seeds import uniforms
from grpo.types import Completion, Request

# Sequences written at once; more are done in turns.
MAX_SEQUENCES = 512

# Of the canary, after each of its prompts. Each token is a step of its own, and a small model's step is mostly
# overhead.
CANARY_COMPLETIONS, CANARY_TOKENS = 8, 4

# Finished sequences are dropped when they are at least this share of the computation: dropping copies the cache.
DROP_SHARE = 0.25
# Layers of Hugging Face's cache that hold keys and values alone.
DROPPABLE = (DynamicLayer, DynamicSlidingWindowLayer)


class TorchEngine:
    """Samples from a Policy in this process; its weights are the policy's, so a sync has nothing to copy."""

    def __init__(self, policy: Policy, tokenizer: Any, canary_prompts: list[list[int]], temperature: float):
        """canary_prompts: tokens [P] of prompts that the canary's completions are written after."""
        self.policy, self.tokenizer, self.temperature = policy, tokenizer, temperature
        self.stop_tokens = set(policy.stop_tokens)
        self.canary = build_canary(self, policy, canary_prompts, CANARY_COMPLETIONS, CANARY_TOKENS, self.choices)

    def sample(self, requests: list[Request], finished: Finished = nobody) -> list[Completion]:
        """See Engine.sample."""
        return [
            completion
            for start in range(0, len(requests), MAX_SEQUENCES)
            for completion in self._write(requests[start : start + MAX_SEQUENCES], start, finished)
        ]

    @torch.no_grad()
    def logprobs(self, contexts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """See Engine.logprobs. Goes through the cache token by token, as sampling does."""
        longest = max(map(len, completions))
        decoder = self._decoder()
        hidden = decoder.start(*_counted(contexts), longest)
        scored = []
        for position in range(longest):
            # A sequence that is already at its end is fed its first token again; what comes out is not looked at.
            tokens = torch.tensor(
                [c[position] if position < len(c) else c[0] for c in completions], device=hidden.device
            )
            scored.append(self._distribution(hidden).gather(1, tokens[:, None]).squeeze(1))
            hidden = decoder.feed(tokens) if position + 1 < longest else hidden
        rows = torch.stack(scored, dim=1).tolist()
        return [row[: len(completion)] for row, completion in zip(rows, completions, strict=True)]

    @torch.no_grad()
    def choices(self, context: list[int], completion: list[int]) -> Tensor | None:
        """The experts that were chosen as in sampling, at each token but the last: [T, layers that have some, k]."""
        with watched(experts_in(self.policy.model)) as seen:
            decoder = self._decoder()
            hidden = decoder.start([context], [1], len(completion))
            for token in completion[:-1]:
                decoder.feed(torch.tensor([token], device=hidden.device))
        return together(seen)

    def take_up(self) -> None:
        """See Engine.take_up. The weights are the policy's, and nothing is cached between calls."""

    def sync(self) -> dict[str, float]:
        """See Engine.sync."""
        return self.canary.check()

    def release(self) -> None:
        """See Engine.release. Nothing is held between calls."""

    def close(self) -> None:
        """See Engine.close."""

    @torch.no_grad()
    def _write(self, requests: list[Request], start: int, finished: Finished) -> list[Completion]:
        """Sample until every completion has stopped or is as long as it may be. A context is read once for the requests
        of it that follow each other. start: of the first of them among all."""
        longest = max(request.max_tokens for request in requests)
        decoder = self._decoder()
        hidden = decoder.start(*_counted([request.context for request in requests]), longest)
        draws = torch.from_numpy(uniforms([request.seed for request in requests], longest)).to(hidden.device)
        drafts = [_Draft(request.max_tokens) for request in requests]
        most_kept = 1 - DROP_SHARE if decoder.can_drop else 0.0
        rows = list(range(len(drafts)))  # the draft that each row of the decoder writes
        completions: dict[int, Completion] = {}  # by draft
        for position in range(longest):
            logprobs = self._distribution(hidden)  # [rows, V]
            tokens = draw(logprobs, draws[rows, position])
            chosen = logprobs.gather(1, tokens[:, None]).squeeze(1).tolist()
            for row, token, logprob in zip(rows, tokens.tolist(), chosen, strict=True):
                drafts[row].append(token, logprob, self.stop_tokens)
            for row in rows:
                if drafts[row].is_done and row not in completions:
                    completions[row] = self._completion(drafts[row])
                    finished(start + row, completions[row])
            going = [at for at, row in enumerate(rows) if not drafts[row].is_done]
            if not going:
                break
            if len(going) <= most_kept * len(rows):
                decoder.keep(going)
                rows, tokens = [rows[at] for at in going], tokens[going]
            hidden = decoder.feed(tokens)
        return [completions[row] for row in range(len(drafts))]

    def _completion(self, draft: _Draft) -> Completion:
        return completion_of(draft.tokens, draft.logprobs, draft.stopped, self.tokenizer, self.policy.version)

    def _distribution(self, hidden: Tensor) -> Tensor:
        """log p at the sampling temperature of every token, float32: [S, D] -> [S, V]."""
        return self.policy.distribution(hidden, self.temperature)

    def _decoder(self) -> Decoder:
        model = self.policy.model
        return PackedDecoder(model) if isinstance(model, FusedModel) else PaddedDecoder(model)


def _counted(contexts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Equal contexts that follow each other as one, and how many of each there were."""
    counted = [(context, len(list(same))) for context, same in groupby(contexts)]
    return [context for context, _ in counted], [count for _, count in counted]


def draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """A token of each distribution [S, V] by a number in [0, 1) of each [S]: the first whose cumulated probability is
    above the number. One number a token, so that who else is sampled changes nothing."""
    cumulated = logprobs.double().exp().cumsum(dim=1)
    aim = uniform[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, aim, right=True).squeeze(1).clamp(max=logprobs.shape[1] - 1)


@dataclass
class _Draft:
    """A completion being written. What is sampled after its end is thrown away."""

    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False

    def append(self, token: int, logprob: float, stop_tokens: set[int]) -> None:
        if not self.is_done:
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self.stopped = token in stop_tokens

    @property
    def is_done(self) -> bool:
        return self.stopped or len(self.tokens) == self.max_tokens


class Decoder(Protocol):
    """The state of S sequences being written. `can_drop` is known after the start."""

    can_drop: bool

    def start(self, prompts: list[list[int]], copies: list[int], max_tokens: int) -> Tensor:
        """Read the prompts, each for its number of `copies`, S sequences in all that get at most `max_tokens` more
        tokens; the last hidden states [S, D]."""
        ...

    def feed(self, tokens: Tensor) -> Tensor:
        """One more token for each sequence, [S] -> hidden states [S, D]."""
        ...

    def keep(self, rows: list[int]) -> None:
        """Go on with these sequences only."""
        ...


class PackedDecoder:
    """Prompts packed and read once each; then one token a sequence over a KeyValueCache."""

    can_drop = True

    def __init__(self, model: FusedModel):
        self.model = model

    def start(self, prompts: list[list[int]], copies: list[int], max_tokens: int) -> Tensor:
        """See Decoder.start."""
        device = self.model.head.device
        layout = GroupLayout.of([len(prompt) for prompt in prompts], device=device)
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        hidden, self.cache = self.model.prefill(tokens, layout, copies, max_tokens)
        return hidden[layout.prompts[1:].long() - 1].repeat_interleave(torch.tensor(copies, device=device), dim=0)

    def feed(self, tokens: Tensor) -> Tensor:
        """See Decoder.feed."""
        return self.model.decode(tokens, self.cache)

    def keep(self, rows: list[int]) -> None:
        """See Decoder.keep."""
        self.cache.keep(rows)


class PaddedDecoder:
    """Any Hugging Face model: prompts padded at their start, its own cache."""

    def __init__(self, model: GenericModel):
        self.model = model.model
        # transformers 5.24 has another name for it, and warns of the old one at every call
        named = inspect.signature(body_of(self.model).forward).parameters
        self.cache_argument = "cache" if "cache" in named else "past_key_values"

    def start(self, prompts: list[list[int]], copies: list[int], max_tokens: int) -> Tensor:
        """See Decoder.start."""
        device = self.model.device
        longest = max(map(len, prompts))
        rows = [prompt for prompt, count in zip(prompts, copies, strict=True) for _ in range(count)]
        tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        self.mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        self.cache = DynamicCache(config=self.model.config)
        # The states of linear attention and of convolutions have no way to leave some rows out.
        self.can_drop = all(type(layer) in DROPPABLE for layer in self.cache.layers)
        return self._run(tokens, (self.mask.cumsum(1) - 1).clamp(min=0))

    def feed(self, tokens: Tensor) -> Tensor:
        """See Decoder.feed."""
        positions = self.mask.sum(1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(positions)], dim=1)
        return self._run(tokens[:, None], positions)

    def keep(self, rows: list[int]) -> None:
        """See Decoder.keep."""
        index = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask[index]
        self.cache.batch_select_indices(index)

    def _run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        out = body_of(self.model)(
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=positions,
            use_cache=True,
            **{self.cache_argument: self.cache},
        )
        return out.last_hidden_state[:, -1]
