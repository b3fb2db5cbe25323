"""Tokens: of some completions of a step, what the update saw of each token. Knows no loss: it listens to any.

    TokenTrace(loss)          stands before the loss of an update and keeps the first batch that is whole
    trace.records(groups)     that batch, a record a completion, with the texts of the tokens

Nothing is computed for it: log-probabilities and entropies are those of the update's own forward pass, and the weight
of a token is the gradient of its own backward pass.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate, islice, pairwise
from typing import Any

from torch import Tensor

from grpo.types import Batch, Group

TRACED_GROUPS = 2  # of a step
TRACED_COMPLETIONS = 4  # of a group
TRACED_TOKENS = 2048  # of a step: 70 kB of JSON
DIGITS = 4  # that a number is written with

_PART_OF_A_LETTER = "\ufffd"  # what a byte that is no letter by itself is decoded to
_MOST_TOKENS_OF_A_LETTER = 4  # as many as it has bytes

Decode = Callable[[Sequence[int]], str]
Seen = tuple[Tensor, Tensor, Tensor, Batch]  # log p, entropy, d loss / d log p, all [N]


class TokenTrace:
    """A loss as the update calls it: what the inner one gives, looked at on its way.

    `weight` of a token is -(d loss / d log p) over the token's share in the loss: the advantage, times ratio and
    correction, 0 where the objective clips or a mask drops it. So it is what the update pushed the token by.
    """

    def __init__(self, loss: Any, decode: Decode):
        """decode: tokens -> their text."""
        self._loss = loss
        self._texts = token_texts(decode)
        self._seen: dict[str, Seen] = {}  # under "first", the first batch of the step whose backward pass is done
        self.prepare, self.prepare_step, self.summarize = loss.prepare, loss.prepare_step, loss.summarize
        self.differentiable_entropy = loss.differentiable_entropy

    def __call__(self, logprobs: Tensor, entropy: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See grpo.loss.Loss."""
        value, sums = self._loss(logprobs, entropy, batch)
        logprobs.register_hook(partial(self._look, logprobs.detach(), entropy.detach(), batch))
        return value, sums

    def records(self, groups: Sequence[Group]) -> list[dict[str, Any]]:
        """Of the step that was trained on these groups; empty where it trained nothing. Forgets it."""
        seen = list(self._seen.values())
        self._seen.clear()
        return [record for each in seen for record in self._records(each, groups)]

    def _look(self, logprobs: Tensor, entropy: Tensor, batch: Batch, gradient: Tensor) -> None:
        self._seen.setdefault("first", (logprobs, entropy, gradient, batch))

    def _records(self, seen: Seen, groups: Sequence[Group]) -> list[dict[str, Any]]:
        logprobs, entropy, gradient, batch = seen
        weight = -gradient / batch.weights.masked_fill(batch.weights == 0, 1.0)
        columns = {
            "logprob": logprobs.tolist(),
            "gap": (logprobs - batch.sampler_logprobs).tolist(),
            "entropy": entropy.tolist(),
            "weight": weight.tolist(),
        }
        tokens = batch.tokens.tolist()
        places = places_in(groups)
        records = []
        for prompt, completion, shown in _chosen(batch):
            group, member = places[_key(tokens[prompt], tokens[completion])]
            written = {name: [_short(value) for value in column[shown]] for name, column in columns.items()}
            records.append({"group": group, "member": member, "texts": self._texts(tokens[shown]), **written})
        return records


def places_in(groups: Sequence[Group]) -> dict[tuple[int, ...], tuple[int, int]]:
    """What a completion is known by -> (its group, its place in it). Equal ones are equal in all that is traced."""
    return {
        _key(group.prompt.tokens, completion.tokens): (number, member)
        for number, group in enumerate(groups)
        for member, completion in enumerate(group.completions)
    }


def _key(prompt: Sequence[int], completion: Sequence[int]) -> tuple[int, ...]:
    return (*prompt, -1, *completion)


def _chosen(batch: Batch) -> list[tuple[slice, slice, slice]]:
    """(prompt, completion, what of it is written down) of some completions, in packed tokens: evenly spread over each
    of the first groups, and so many that their tokens are not too many; the last one is cut."""
    layout = batch.layout
    prompts = pairwise(accumulate(layout.prompt_lengths, initial=0))
    starts = accumulate(map(sum, layout.completion_lengths), initial=layout.num_prompt_tokens)
    spans = []
    for prompt, lengths, start in islice(zip(prompts, layout.completion_lengths, starts, strict=False), TRACED_GROUPS):
        completions = list(pairwise(accumulate(lengths, initial=start)))
        spans += [(prompt, each) for each in completions[:: -(-len(completions) // TRACED_COMPLETIONS)]]
    used = list(accumulate((end - start for _, (start, end) in spans), initial=0))
    return [
        (slice(*prompt), slice(start, end), slice(start, min(end, start + TRACED_TOKENS - before)))
        for (prompt, (start, end)), before in zip(spans[: bisect_left(used, TRACED_TOKENS)], used, strict=False)
    ]


def token_texts(decode: Decode) -> Callable[[Sequence[int]], list[str]]:
    """A function: tokens [T] -> the text that each adds [T]. Where a letter is of several tokens, the last one has it.

    decode: of any tokens, in order.
    """

    @cache
    def text_of(token: int) -> str:
        # Behind itself: some tokenizers drop the space before a first word.
        return decode([token, token]).removeprefix(decode([token]))

    def texts(tokens: Sequence[int]) -> list[str]:
        found = list(map(text_of, tokens))
        return _letters_whole(decode, tokens) if _PART_OF_A_LETTER in "".join(found) else found

    return texts


def _letters_whole(decode: Decode, tokens: Sequence[int]) -> list[str]:
    """The text of each token, that of a letter with its last one."""
    found: list[str] = []
    waiting: list[int] = []
    for token in tokens:
        waiting.append(token)
        text = decode(waiting * 2).removeprefix(decode(waiting))
        is_whole = _PART_OF_A_LETTER not in text or len(waiting) == _MOST_TOKENS_OF_A_LETTER
        found.append(text * is_whole)
        waiting = waiting[: len(waiting) * (not is_whole)]
    return found


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
