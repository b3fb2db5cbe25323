"""Policy: the trained model. Log-probabilities of packed batches, and the update. Knows nothing of rewards or engines.

logprobs(batch)          log p and entropy of every sampled token, with gradient
update(batches, step)    passes that the loss needs -> forward, loss, backward -> one optimizer step each
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from grpo_kernels import linear_logprob
from torch import Tensor

from grpo.config import Config
from grpo.loss import Pass, build_loss, summarize
from grpo.policy.load import Loaded
from grpo.policy.optimizer import build_optimizer, clip_gradient, learning_rate
from grpo.types import Batch

Preparation = Callable[[list[Batch]], None]


class Policy:
    """A model over a ProjectionStore, its optimizer, and the choices of its loss.

    `version` counts optimizer updates: completions carry the version that sampled them.
    """

    def __init__(self, loaded: Loaded, config: Config):
        self.model, self.store = loaded.model, loaded.store
        self.stop_tokens, self.source, self.conv1d = loaded.stop_tokens, loaded.source, loaded.conv1d
        self.config = config
        self.version = 0
        self.loss = build_loss(config)
        self.optimizer = build_optimizer(self.store.parameters(), config)
        takes_several_steps = config.mini_batches * config.epochs > 1
        self.old_logprobs = _stored if takes_several_steps else _same_pass
        self.preparations = self._choose_preparations(takes_several_steps)

    @property
    def device(self) -> torch.device:
        return self.model.head.device

    def logprobs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """log p(token | what came before) and the entropy of that distribution, both [N] float32, at the sampling
        temperature, 0 where nothing was sampled.

        Only sampled tokens reach the head, whose logits never exist for all of them at once.
        """
        hidden = self.model.hidden(batch)  # [N, D]
        sampled = batch.mask.nonzero().squeeze(1)
        # The one shift: a token is predicted at the token before it.
        logprobs, entropy = linear_logprob(
            hidden[batch.previous[sampled]],
            self.model.head,
            batch.tokens[sampled],
            self.config.temperature,
            self.model.softcap,
            differentiable_entropy=self.config.entropy_coef > 0,
        )
        zeros = torch.zeros(batch.tokens.shape, device=hidden.device)
        return zeros.index_copy(0, sampled, logprobs), zeros.index_copy(0, sampled, entropy)

    @torch.no_grad()
    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`logprobs` without gradient."""
        return self.logprobs(batch)

    @torch.no_grad()
    def score_reference(self, batch: Batch) -> Tensor:
        """log p under the base model, adapter off, [N]."""
        with self.store.reference():
            return self.logprobs(batch)[0]

    def update(self, optimizer_steps: list[list[Batch]], step: int) -> dict[str, float]:
        """One optimizer step for each non-empty list of batches, `epochs` times over. Returns the step's metrics.

        Where every group had equal rewards nothing is trained, and the adapter stays as it is.
        """
        rate = learning_rate(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        optimizer_steps = [batches for batches in optimizer_steps if batches]
        for batches in optimizer_steps:
            self.prepare(batches)
        norms: list[float] = []
        sums: list[dict[str, Tensor]] = []
        for batches in optimizer_steps * self.config.epochs:
            sums += [self.backward(batch) for batch in batches]
            norms.append(self._optimizer_step())
        metrics = summarize(sums)
        return metrics | {"optim/grad_norm": max(norms, default=0.0), "optim/learning_rate": rate}

    def prepare(self, batches: list[Batch]) -> None:
        """Run the no-gradient passes that the loss needs over the batches of one optimizer step."""
        for preparation in self.preparations:
            preparation(batches)

    def backward(self, batch: Batch) -> dict[str, Tensor]:
        """Add the gradient of a batch's share of the loss to the masters; returns the sums of its metrics."""
        logprobs, entropy = self.logprobs(batch)
        loss, sums = self.loss(Pass(logprobs, entropy, self.old_logprobs(logprobs, batch)), batch)
        loss.backward()
        return sums

    def _optimizer_step(self) -> float:
        norm = clip_gradient(self.store.parameters(), self.config.max_grad_norm)
        # Counted first: a step that fails half-way, for want of memory say, leaves weights that are no longer the old.
        self.version += 1
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.store.refresh()
        return norm

    def _choose_preparations(self, takes_several_steps: bool) -> tuple[Preparation, ...]:
        """The no-gradient passes that the loss needs before the first optimizer step."""
        chosen: list[tuple[bool, Preparation]] = [
            (takes_several_steps, self._store_old_logprobs),
            (self.config.kl_coef > 0, self._store_reference_logprobs),
            (self.config.top_entropy < 1, self._store_entropy_floor),
        ]
        return tuple(preparation for needed, preparation in chosen if needed)

    def _store_old_logprobs(self, batches: list[Batch]) -> None:
        for batch in batches:
            batch.old_logprobs = self.score(batch)[0]

    def _store_reference_logprobs(self, batches: list[Batch]) -> None:
        for batch in batches:
            batch.reference_logprobs = self.score_reference(batch)

    def _store_entropy_floor(self, batches: list[Batch]) -> None:
        """The entropy that the top share of the optimizer step's sampled tokens reaches."""
        entropies = torch.cat([self.score(batch)[1][batch.mask] for batch in batches]).sort(descending=True).values
        floor = float(entropies[max(0, round(len(entropies) * self.config.top_entropy) - 1)])
        for batch in batches:
            batch.entropy_floor = floor


def _same_pass(logprobs: Tensor, batch: Batch) -> Tensor:
    """With one optimizer step a rollout the policy that sampled is the policy that is updated: no pass of its own."""
    return logprobs.detach()


def _stored(logprobs: Tensor, batch: Batch) -> Tensor:
    return batch.old_logprobs
