"""Prompts as the model reads them: token by token, for a terminal. Knows nothing of rewards.

Each token stands in brackets, with what no eye sees written as Python writes it; a line ends where a token ends one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.text import Text

from grpo.cautions import opened_in
from grpo.prompts import MADE_AT_ONCE
from grpo.questions import Questions
from grpo.terminal import console
from grpo.types import Completion, Prompt

HEAD, TAIL = 400, 150  # tokens that are shown of a long prompt


def show_prompts(questions: Questions, ends: Sequence[int]) -> None:
    """Print some prompts, and what ends a completion. ends: those tokens."""
    tokenizer = questions.tokenizer
    for which, prompt in three(questions):
        _print(Text(f"{which}, row {prompt.index}, as the model reads it: {len(prompt.tokens):,} tokens", style="bold"))
        _print(as_read(tokenizer, prompt.tokens))
        opened = opened_in(prompt)
        _print(Text(f"  the completion begins here{f', inside of {shown(opened)}' if opened else ''}", style="dim"))
    answers = questions.lessons[0].completions if questions.lessons else []
    for name, answer in zip(("chosen", "rejected") if len(answers) > 1 else ("taught",), answers, strict=False):
        _print(Text(f"what is {name} behind the first of them; the words of others are dim", style="bold"))
        _print(as_taught(tokenizer, answer))
    told = (f"{shown(piece)} ({token})" for token, piece in zip(ends, pieces(tokenizer, ends), strict=True))
    _print(Text(f"tokens that end a completion: {', '.join(told)}"))


def three(questions: Questions) -> list[tuple[str, Prompt]]:
    """The first training prompt, the longest of the others that are at hand, and the first that is held out; where
    answers are taught, what the first of them follow."""
    if questions.lessons and questions.held_out:
        splits = (("training", questions.lessons), ("held-out", questions.held_out))
        return [(f"the first {split} prompt", lessons[0].prompt) for split, lessons in splits]
    first, *others = questions.train[:MADE_AT_ONCE]
    longest = sorted(others, key=lambda prompt: len(prompt.tokens))[-1:]
    which = f"of {MADE_AT_ONCE:,} the longest" if len(questions.train) > MADE_AT_ONCE else "the longest"
    return [
        ("the first training prompt", first),
        *((f"{which} training prompt", prompt) for prompt in longest),
        ("the first held-out prompt", questions.test[0]),
    ]


def as_read(tokenizer: Any, tokens: Sequence[int]) -> Text:
    """The tokens in brackets, those marked that are left out of texts; the middle of a long prompt is counted."""
    marked = {token for token in set(tokens) if not tokenizer.decode([token], skip_special_tokens=True)}
    left_out = max(0, len(tokens) - HEAD - TAIL)
    text = Text()
    for place, (token, piece) in enumerate(zip(tokens, pieces(tokenizer, tokens), strict=True)):
        if HEAD <= place < HEAD + left_out:
            text.append(f"\n... {left_out:,} more tokens ...\n" * (place == HEAD), style="dim")
            continue
        text.append("[", style="dim")
        text.append(shown(piece), style="bold magenta" if token in marked else "")
        text.append("]", style="dim")
        text.append("\n" * (piece.endswith("\n") and place + 1 < len(tokens)))
    return text


def as_taught(tokenizer: Any, answer: Completion) -> Text:
    """The first tokens of a given answer in brackets, dim where they are read and not taught."""
    text = Text()
    tokens = answer.tokens[:HEAD]
    for piece, is_taught in zip(pieces(tokenizer, tokens), answer.mask, strict=False):
        text.append(f"[{shown(piece)}]" + "\n" * piece.endswith("\n"), style="" if is_taught else "dim")
    left = len(answer.tokens) - len(tokens)
    text.append(f"\n... {left:,} more tokens" * (left > 0), style="dim")
    return text


def pieces(tokenizer: Any, tokens: Sequence[int]) -> Iterator[str]:
    """The text of each token. One that is a part of a letter has its name in the vocabulary instead."""
    before: list[int] = []
    for token in tokens:
        # Behind the one before it: some tokenizers drop the space in front of a text's first word.
        text, without = (tokenizer.decode(each, skip_special_tokens=False) for each in ([*before, token], before))
        piece = text.removeprefix(without) if text.startswith(without) else tokenizer.decode([token])
        yield piece if "\ufffd" not in piece else str(tokenizer.convert_ids_to_tokens([token])[0])
        before = [token]


def shown(text: str) -> str:
    """A text without anything that a terminal would obey, or that cannot be seen but as a space."""
    escaped = text.replace("\\", "\\\\")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in escaped)


def _print(text: Text) -> None:
    # A log file may be of an encoding that cannot hold every letter.
    text.plain = text.plain.encode(console.encoding, errors="replace").decode(console.encoding)
    console.print(text, soft_wrap=True)
