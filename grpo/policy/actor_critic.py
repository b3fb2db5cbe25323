"""Actor and critic: a policy with a value head on its own hidden states. Knows nothing of rewards, nor of what becomes
of its values (grpo/gae.py).

    value(t) = h_t . w + b      h_t: the last hidden state [D] before token t, the one that its log-probability is of

The head is one float32 vector [D + 1], w and b. It begins as zeros, so nothing is drawn for it, and is trained by the
adapter's optimizer at a rate of its own. Its gradient ends at the hidden states: it reads what the policy knows and
does not change it, so no coefficient has to hold the policy's loss against the values'. It is no part of the adapter:
nothing that samples, exports or scores a policy has a use for it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.config import Config
from grpo.policy.load import Loaded
from grpo.policy.policy import Policy, aligned, sampled_of
from grpo.types import Batch
from grpo.world import ALONE, World


class ActorCritic(Policy):
    """A Policy that says, beside each token's log-probability, what it expects to earn from there on."""

    def __init__(self, loaded: Loaded, config: Config, world: World = ALONE):
        """See Policy."""
        head = loaded.model.head
        self.value_head = nn.Parameter(torch.zeros(head.shape[1] + 1, device=head.device))
        super().__init__(loaded, config, world)
        times = (config.value_lr or config.learning_rate) / config.learning_rate
        self.optimizer.add_param_group({"params": [self.value_head], "times": times})

    def masters(self) -> list[nn.Parameter]:
        """See Policy.masters: the value head too."""
        return [*super().masters(), self.value_head]

    def beside(self) -> dict[str, Tensor]:
        """See Policy.beside."""
        return {"value_head": self.value_head.detach()}

    def forward(self, batch: Batch, differentiable_entropy: bool = False) -> tuple[Tensor, Tensor, Batch]:
        """See Policy.forward: the batch has the values of the same pass, with gradient."""
        sampled = sampled_of(batch)
        hidden = self._before_sampled(batch, sampled)
        of_actor = self._of_hidden(hidden, batch.tokens[sampled], differentiable_entropy)
        logprobs, entropy, values = (aligned(each, sampled, batch) for each in (*of_actor, self._values(hidden)))
        return logprobs, entropy, replace(batch, values=values)

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        """The value before each sampled token, [N], no gradient; 0 where nothing was sampled."""
        parts = self.fit(lambda part: self._values(self._before_sampled(part, sampled_of(part))), batch)
        return aligned(torch.cat(parts), sampled_of(batch), batch)

    def _values(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, D] -> [n]."""
        return F.linear(hidden.detach().float(), self.value_head[None, :-1], self.value_head[-1:]).squeeze(1)
