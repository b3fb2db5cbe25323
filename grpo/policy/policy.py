"""Policy: the trained model. Log-probabilities of packed batches, and the update. Knows nothing of rewards or engines,
nor of what it is taught by: the loss comes from outside.

logprobs(batch)              log p and entropy of every sampled token, with gradient where torch records one
read(batch)                  the same without gradient, in as many parts as memory asks for
rehearse(batch, loss)        a batch as an update would run it, of which nothing stays
forward(batch)               what the loss of a batch is called with
update(steps, loss, rate)    for each optimizer step: what the loss prepares -> forward, loss, backward of each batch
"""

from __future__ import annotations

from functools import partial
from itertools import chain, compress

import torch
import torch.nn.functional as F
from grpo_kernels import head_product, linear_logprob
from torch import Tensor, nn

from grpo.config import Config
from grpo.fitting import Fitting
from grpo.loss import Loss
from grpo.packing import batch_limit
from grpo.policy.load import Loaded
from grpo.policy.optimizer import build_optimizer, clip_gradient, state_to_come
from grpo.seeds import mix_seed
from grpo.types import Batch
from grpo.world import ALONE, World

# Rows whose distributions over the whole vocabulary exist at once: 78 MB of float32 at 152,000 tokens.
ROWS_AT_ONCE = 128
OF_OPTIMIZER_STEPS = {"policy/loss"}  # metrics that a loss sums over them, where it has these


class Policy:
    """A model over a ProjectionStore, and its optimizer.

    `version` counts optimizer updates: completions carry the version that sampled them.
    """

    def __init__(self, loaded: Loaded, config: Config, world: World = ALONE):
        """world: whose ranks have the same adapter, and batches of their own in an update."""
        self.model, self.store = loaded.model, loaded.store
        self.stop_tokens, self.source, self.conv1d = loaded.stop_tokens, loaded.source, loaded.conv1d
        self.config, self.world = config, world
        self.version = 0
        self.optimizer = build_optimizer(self.store.parameters(), config)
        self.fit = Fitting(batch_limit(config))
        self.reference = self.store.reference  # inside of it the model is the reference policy
        self.head_rows: int | None = None  # tokens whose logits there are at once; None: as many as the kernel likes

    def refer_to_start(self) -> None:
        """From now on the reference policy is this one, as it is now."""
        self.store.keep_start()
        self.reference = self.store.started

    @property
    def device(self) -> torch.device:
        return self.model.head.device

    def masters(self) -> list[nn.Parameter]:
        """All that is trained, float32: the adapter's factors."""
        return self.store.parameters()

    def beside(self) -> dict[str, Tensor]:
        """What is trained and is no part of the adapter, by names that a checkpoint has it under."""
        return {}

    def logprobs(self, batch: Batch, differentiable_entropy: bool = False) -> tuple[Tensor, Tensor]:
        """log p(token | what came before) and the entropy of that distribution, both [N] float32, at the sampling
        temperature, 0 where nothing was sampled.

        Only sampled tokens reach the head, whose logits never exist for all of them at once. The entropy has a gradient
        where that is asked for.
        """
        sampled = sampled_of(batch)
        logprobs, entropy = self._of_sampled(batch, sampled, differentiable_entropy)
        return aligned(logprobs, sampled, batch), aligned(entropy, sampled, batch)

    def forward(self, batch: Batch, differentiable_entropy: bool = False) -> tuple[Tensor, Tensor, Batch]:
        """What the loss of a batch is called with: `logprobs`, and the batch with what else a pass over it gives."""
        return *self.logprobs(batch, differentiable_entropy), batch

    @torch.no_grad()
    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`logprobs` without gradient. Where memory does not hold a pass over the whole batch, its parts are passed."""
        sampled = sampled_of(batch)
        parts = self.fit(lambda part: self._of_sampled(part, sampled_of(part)), batch)
        logprobs, entropy = map(torch.cat, zip(*parts, strict=True))
        return aligned(logprobs, sampled, batch), aligned(entropy, sampled, batch)

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """log p under the reference policy, [N], no gradient."""
        with self.reference():
            return self.read(batch)[0]

    @torch.no_grad()
    def ranks(self, batch: Batch, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each of the n sampled tokens of a batch, [n] float32 each: log p; its rank, the probability of likelier
        tokens and, times its number of `draws` [n] in [0, 1), of those as likely; and 1 - the largest probability
        there was.
        """
        parts = [rows for part in self.fit(self._ranks, batch) for rows in part]
        logprobs, above, equal, largest = (torch.cat(column) for column in zip(*parts, strict=True))
        return logprobs, above + draws.to(above) * equal, 1 - largest

    def distribution(self, hidden: Tensor, temperature: float) -> Tensor:
        """log p of every token after these final hidden states, float32: [S, D] -> [S, V]."""
        logits = head_product(hidden, self.model.head)
        temperature, softcap = self.model.logits.at(temperature)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.log_softmax(logits / temperature, dim=-1)

    def update(self, optimizer_steps: list[list[Batch]], loss: Loss, rate: float, epochs: int = 1) -> dict[str, float]:
        """One optimizer step at learning rate `rate` for each list of batches that is not empty on all ranks, `epochs`
        times over. Returns the metrics, which are those of the batches of all ranks; the loss is the mean of the
        optimizer steps', each of which has its own denominator.

        Where all lists are empty nothing is trained, and the adapter stays as it is.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("times", 1.0)
        trains = self.world.gather([bool(batches) for batches in optimizer_steps])
        optimizer_steps = list(compress(optimizer_steps, map(any, zip(*trains, strict=True))))
        for batches in optimizer_steps:
            loss.prepare(self, batches)
        norms: list[float] = []
        sums: list[dict[str, Tensor]] = []
        for batches in optimizer_steps * epochs:
            loss.prepare_step(self, batches)
            sums += [part for batch in batches for part in self.fit(partial(self.backward, loss=loss), batch)]
            norms.append(self._optimizer_step())
        on_cpu = [{name: value.cpu() for name, value in part.items()} for part in sums]
        all_sums, split = zip(*self.world.gather((on_cpu, self.fit.count())), strict=True)
        told = loss.summarize(list(chain.from_iterable(all_sums)))
        told |= {name: told[name] / max(1, len(norms)) for name in OF_OPTIMIZER_STEPS & told.keys()}
        return told | {
            "policy/split_batches": sum(split),
            "optim/grad_norm": max(norms, default=0.0),
            "optim/learning_rate": rate,
        }

    def rehearse(self, batch: Batch, loss: Loss) -> None:
        """Run a batch forward and backward as an update would, and leave nothing of it: what memory does not hold shows
        at once, and how large batches may be is settled.

        Beside it lie a gradient of earlier batches and what the optimizer will hold, as they will in a step.
        """
        masters = self.masters()
        beside = state_to_come(self.optimizer)
        try:
            for master in masters:
                master.grad = torch.zeros_like(master)
            loss.prepare(self, [batch])
            loss.prepare_step(self, [batch])
            self.fit(partial(self.backward, loss=loss), batch)
        finally:
            del beside
            self.optimizer.zero_grad(set_to_none=True)
        self.fit.count()  # no step's
        torch.cuda.empty_cache()  # for the engine, which has an allocator of its own

    def backward(self, batch: Batch, loss: Loss) -> dict[str, Tensor]:
        """Add the gradient of a batch's share of the loss to the masters; returns the sums of its metrics.

        Nothing is added before all of it is there: a batch that failed half-way can be tried again.
        """
        masters = self.masters()
        value, sums = loss(*self.forward(batch, loss.differentiable_entropy))
        for master, gradient in zip(masters, torch.autograd.grad(value, masters, allow_unused=True), strict=True):
            _add_gradient(master, gradient)
        return sums

    def digest(self) -> int:
        """A number of the bits of all that is trained: where it differs, they do."""
        sums = [master.detach().view(torch.int32).sum(dtype=torch.int64) for master in self.masters()]
        return mix_seed(*torch.stack(sums).tolist())

    def of_all_ranks(self, values: list[Tensor]) -> Tensor:
        """The values, [n] each, of every rank, one behind the other."""
        return torch.cat(list(chain.from_iterable(self.world.gather([each.cpu() for each in values])))).to(self.device)

    def _optimizer_step(self) -> float:
        self.world.sum_gradients(self.masters())
        norm = clip_gradient(self.store.parameters(), self.config.max_grad_norm)
        # Counted first: a step that fails half-way, for want of memory say, leaves weights that are no longer the old.
        self.version += 1
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.store.refresh()
        return norm

    def _of_sampled(self, batch: Batch, sampled: Tensor, differentiable_entropy: bool = False) -> tuple[Tensor, Tensor]:
        """log p and entropy of the n sampled tokens of a batch, [n] each."""
        return self._of_hidden(self._before_sampled(batch, sampled), batch.tokens[sampled], differentiable_entropy)

    def _of_hidden(self, hidden: Tensor, tokens: Tensor, differentiable_entropy: bool) -> tuple[Tensor, Tensor]:
        """The same of the hidden states [n, D] that predict these tokens [n]."""
        return linear_logprob(
            hidden,
            self.model.head,
            tokens,
            *self.model.logits.at(self.config.temperature),
            differentiable_entropy=differentiable_entropy,
            chunk_rows=self.head_rows,
        )

    def _before_sampled(self, batch: Batch, sampled: Tensor) -> Tensor:
        """The hidden states that predict the n sampled tokens, [n, D]."""
        # The one shift: a token is predicted at the token before it.
        return self.model.hidden(batch)[batch.previous[sampled]]

    def _ranks(self, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """`_rank` of the sampled tokens of a batch, some rows at once."""
        sampled = sampled_of(batch)
        hidden = self._before_sampled(batch, sampled)
        rows = zip(hidden.split(ROWS_AT_ONCE), batch.tokens[sampled].split(ROWS_AT_ONCE), strict=True)
        return [self._rank(states, tokens) for states, tokens in rows]

    def _rank(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden [S, D], tokens [S] -> log p, the probability above and of the same, and the largest, [S] each."""
        logprobs = self.distribution(hidden, self.config.temperature)
        own = logprobs.gather(1, tokens[:, None])
        p = logprobs.exp()
        above, equal = (p * (logprobs > own)).sum(1), (p * (logprobs == own)).sum(1)
        return own.squeeze(1), above, equal, p.amax(1)


def sampled_of(batch: Batch) -> Tensor:
    """The indices of the n sampled tokens of a batch, [n]. To count them is to wait for the GPU, so it is done before a
    pass."""
    return batch.mask.nonzero().squeeze(1)


def aligned(values: Tensor, sampled: Tensor, batch: Batch) -> Tensor:
    """Values of the n sampled tokens, [n] float32, as a column of the batch, [N]; 0 on the rest."""
    return torch.zeros(batch.tokens.shape, device=values.device).index_copy(0, sampled, values)


def _add_gradient(master: Tensor, gradient: Tensor | None) -> None:
    if gradient is not None:  # an expert that no token of the batch was sent to has none
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
