"""Groups: prompts in, groups of completions out, by whichever engine. Knows nothing of rewards or gradients."""

from __future__ import annotations

from collections.abc import Sequence

from grpo.rollout.engine import Engine
from grpo.seeds import mix_seed
from grpo.types import Group, Prompt, Request


def sample_groups(
    engine: Engine, prompts: Sequence[Prompt], group_size: int, max_tokens: int, seed: int, first_row: int = 0
) -> list[Group]:
    """A group of completions for each prompt.

    A completion's seed is a function of (seed, row, member) alone, where rows are counted from `first_row` and members
    from 0: it depends neither on the engine, nor on its neighbours, nor on how prompts are spread over calls.
    """
    requests = [
        Request(prompt.tokens, mix_seed(seed, row, member), max_tokens)
        for row, prompt in enumerate(prompts, start=first_row)
        for member in range(group_size)
    ]
    completions = engine.sample(requests)
    for request, completion in zip(requests, completions, strict=True):
        completion.seed = request.seed
    rows = range(0, len(completions), group_size)
    return [Group(prompt, completions[row : row + group_size]) for prompt, row in zip(prompts, rows, strict=True)]
