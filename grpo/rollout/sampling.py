"""Groups: prompts in, groups of completions out, by whichever engine. Knows nothing of rewards or gradients.

Whoever has something to do with a group is handed it as soon as its last completion is written, while others are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grpo.rollout.engine import Engine
from grpo.seeds import mix_seed
from grpo.types import Completion, Group, Prompt, Request

Finished = Callable[[int, Group], object]  # is handed a group, and where its first completion stands among all


def nobody(first: int, group: Group) -> None:
    """Waits for no group before all are there."""


def sample_groups(
    engine: Engine,
    prompts: Sequence[Prompt],
    group_size: int,
    max_tokens: int,
    seed: int,
    rows: Sequence[int] | None = None,
    finished: Finished = nobody,
) -> list[Group]:
    """A group of completions for each prompt.

    A completion's seed is a function of (seed, row, member) alone, where members are counted from 0: it depends neither
    on the engine, nor on its neighbours, nor on how prompts are spread over calls and ranks. rows: of these prompts;
    from 0 where none are given.

    finished: is handed each group that is finished before the others, as the engine tells it.
    """
    rows = range(len(prompts)) if rows is None else rows
    requests = [
        Request(prompt.tokens, mix_seed(seed, row, member), max_tokens)
        for row, prompt in zip(rows, prompts, strict=True)
        for member in range(group_size)
    ]
    written: list[dict[int, Completion]] = [{} for _ in prompts]  # of each group, by member

    def take(index: int, completion: Completion) -> None:
        completion.seed = requests[index].seed
        row, member = divmod(index, group_size)
        written[row][member] = completion
        if len(written[row]) == group_size:
            finished(row * group_size, Group(prompts[row], in_order(written[row])))

    engine.sample(requests, take)
    return [Group(prompt, in_order(members)) for prompt, members in zip(prompts, written, strict=True)]


def in_order(members: dict[int, Completion]) -> list[Completion]:
    """A group's completions, by their numbers."""
    return [members[member] for member in range(len(members))]
