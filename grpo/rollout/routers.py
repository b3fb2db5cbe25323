"""Routers: whether the engine sends tokens to the experts that the policy sends them to, measured on the canary.
Knows nothing of how an engine runs.

    sync/rerouted   the share of choices, of a token, a layer and one of its k experts, that the engine makes and the
                    policy does not

The policy's routers are frozen, but what they read is rounded in two ways, and where two experts are as good as each
other that decides: then the update computes with other experts than the rollout did, and there log-probabilities are
furthest apart (Ma et al. 2025, "Stabilizing MoE RL by aligning training and inference routers", arXiv 2510.11370, who
replay the engine's choices). Nothing is replayed here: transformers' routers take no choices from outside, and to have
them returned vLLM 0.26 runs by its older runner. An engine that tells nothing, a server's say, has no such number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grpo.packing import lay_out_to_read
from grpo.policy import Policy
from grpo.policy.generic import GenericModel
from grpo.policy.routing import share_elsewhere
from grpo.types import Completion, Group, Prompt

# (context, completion) -> the experts that the engine chose [T, layers, k] at each token that another one came after
Chosen = Callable[[list[int], list[int]], Tensor | None]

SEQUENCES = 2  # of the canary, each a step of the engine: some hundred tokens, and a choice for each layer


def tells_nothing(context: list[int], completion: list[int]) -> None:
    """Of an engine whose choices cannot be seen."""


def nothing_to_choose() -> dict[str, float]:
    """Of a model without experts."""
    return {}


def build_routers(
    policy: Policy, chosen: Chosen, contexts: list[list[int]], completions: list[list[Completion]]
) -> Callable[[], dict[str, float]]:
    """What measures `sync/rerouted` on some of these, where there is something to choose."""
    model = policy.model
    if not isinstance(model, GenericModel) or not model.experts:
        return nothing_to_choose
    pairs = [(context, some[0]) for context, some in zip(contexts, completions, strict=True) if some][:SEQUENCES]
    return Routers(policy, model, chosen, pairs).check


class Routers:
    """Fixed sequences, and what the policy's and the engine's routers make of them."""

    def __init__(self, policy: Policy, model: GenericModel, chosen: Chosen, pairs: list[tuple[list[int], Completion]]):
        self.model, self.chosen, self.pairs = model, chosen, pairs
        groups = [Group(Prompt(row, "", context, {}), [completion]) for row, (context, completion) in enumerate(pairs)]
        self.batch = lay_out_to_read(groups, policy.device)

    def check(self) -> dict[str, float]:
        """Metrics: sync/rerouted, if the engine tells."""
        theirs = [self.chosen(context, completion.tokens) for context, completion in self.pairs]
        told = [each.cpu() for each in theirs if each is not None]
        if not told or len(told) < len(theirs):
            return {}
        return {"sync/rerouted": share_elsewhere(torch.cat(told), torch.cat(self._policys()))}

    def _policys(self) -> list[Tensor]:
        """The policy's choices at the same tokens, [T, layers, k] of each sequence."""
        layout = self.batch.layout
        chosen = self.model.choices(self.batch).cpu()
        prompts = chosen[: layout.num_prompt_tokens].split(layout.prompt_lengths)
        completions = chosen[layout.num_prompt_tokens :].split(
            [n for group in layout.completion_lengths for n in group]
        )
        return [torch.cat([a, b[:-1]]) for a, b in zip(prompts, completions, strict=True)]
