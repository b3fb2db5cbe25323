"""Voice: the policy answers, with its adapter or without, and each token is told as it is written.

It is the run's own engine (grpo/rollout/torch_engine.py), not a second sampler: what a training run samples from a seed
is what is answered here. It listens where the engine feeds a token back, and at temperature 0 hands it a distribution
that has all its mass on the likeliest token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo.policy import Policy
from grpo.rollout.torch_engine import Decoder, TorchEngine
from grpo.types import Completion, Request

Heard = Callable[[str], object]  # told the whole text so far


class Sampler(TorchEngine):
    """Samples at any temperature, 0 too."""

    def __init__(self, policy: Policy, tokenizer: Any, temperature: float = 1.0):
        # Not the engine's own beginning: that makes a canary, which proves an engine across updates, and here is none.
        self.policy, self.tokenizer, self.temperature = policy, tokenizer, temperature
        self.stop_tokens = set(policy.stop_tokens)

    def _distribution(self, hidden: Tensor) -> Tensor:
        if self.temperature > 0:
            return super()._distribution(hidden)
        logprobs = self.policy.distribution(hidden, 1.0)
        likeliest = logprobs.argmax(dim=-1, keepdim=True)  # of equals the first, as transformers takes it
        return torch.full_like(logprobs, -torch.inf).scatter(-1, likeliest, 0.0)


class Voice(Sampler):
    """Answers one prompt at a time."""

    def __init__(self, policy: Policy, tokenizer: Any):
        super().__init__(policy, tokenizer)
        self.tokens: list[int] = []
        self.heard: Heard = lambda text: None

    def answer(self, context: list[int], seed: int, max_tokens: int, temperature: float, heard: Heard) -> Completion:
        """What comes after these tokens. Where it is interrupted, `so_far` has the text."""
        self.tokens, self.heard, self.temperature = [], heard, temperature
        return self.sample([Request(context, seed, max_tokens)])[0]

    def so_far(self) -> str:
        """The text of the tokens that are written."""
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    def hear(self, token: int) -> None:
        """A token is written, and another one comes after it. Half a character is told when it is whole."""
        self.tokens.append(token)
        text = self.so_far()
        if not text.endswith("\ufffd"):
            self.heard(text)

    def _decoder(self) -> Decoder:
        return _Overheard(super()._decoder(), self.hear)


class _Overheard:
    """A decoder of one sequence, whose tokens are told."""

    def __init__(self, decoder: Decoder, hear: Callable[[int], None]):
        self.decoder, self.hear = decoder, hear
        self.can_drop = False  # there is one

    def start(self, prompts: list[list[int]], copies: list[int], max_tokens: int) -> Tensor:
        """See Decoder.start."""
        return self.decoder.start(prompts, copies, max_tokens)

    def feed(self, tokens: Tensor) -> Tensor:
        """See Decoder.feed."""
        self.hear(int(tokens[0]))
        return self.decoder.feed(tokens)

    def keep(self, rows: list[int]) -> None:
        """See Decoder.keep."""
        self.decoder.keep(rows)
