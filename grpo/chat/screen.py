"""Screen: answers as they are written. What a model writes is shown, never obeyed: `plain` writes out control codes.

On a terminal with room for two columns they stand side by side, and are written out whole when both are done; else they
come one below the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from grpo.chat.dialogue import Answer, Dialogue, Listening
from grpo.chat.voice import Heard
from grpo.terminal import console, plain

TWO_COLUMNS = 100  # characters that a terminal must have for them
LINES_LEFT = 4  # of a terminal, beside the end of the answers while they are written


class Below:
    """One below the other, each token as it comes."""

    def __init__(self, write: Callable[[str], object]):
        self.write = write

    @contextmanager
    def turn(self, speakers: list[str]) -> Iterator[Listening]:
        yield self._listen

    def _listen(self, who: str) -> Heard:
        shown = ""
        self.write(f"\n{who}:\n")

        def heard(text: str) -> None:
            nonlocal shown
            if text.startswith(shown):  # a tokenizer may think better of what it wrote: the rest then comes at the end
                self.write(plain(text[len(shown) :]))
                shown = text

        return heard

    def done(self, answers: list[Answer]) -> None:
        self.write(f"\n\n[{told_of(answers)}]\n")


class Beside:
    """In two columns."""

    @contextmanager
    def turn(self, speakers: list[str]) -> Iterator[Listening]:
        self.texts = dict.fromkeys(speakers, "")
        with Live(console=console, transient=True, auto_refresh=False) as live:

            def listen(who: str) -> Heard:
                def heard(text: str) -> None:
                    self.texts[who] = text
                    live.update(self._table(console.height - LINES_LEFT), refresh=True)

                return heard

            yield listen

    def done(self, answers: list[Answer]) -> None:
        self.texts = {answer.who: answer.text for answer in answers}
        console.print(self._table(None))
        console.print(Text(f"[{told_of(answers)}]", "dim"))

    def _table(self, lines: int | None) -> Table:
        """The texts, of each the last so many lines; None: all."""
        table = Table(*self.texts, expand=True, box=None, padding=(0, 2, 0, 0), header_style="bold")
        width = console.width // len(self.texts) - 2
        table.add_row(*(_end_of(plain(text), width, lines) for text in self.texts.values()))
        return table


def _end_of(text: str, width: int, lines: int | None) -> Text:
    wrapped = Text(text).wrap(console, width)
    return Text("\n").join(wrapped if lines is None else wrapped[-max(1, lines) :])


def told_of(answers: list[Answer]) -> str:
    """How long they are, and how they ended."""
    ends = {"stop": "stopped by itself", "length": "cut off", "interrupted": "interrupted"}
    return "; ".join(f"{each.who}: {each.tokens} tokens, {ends[each.finish]}" for each in answers)


def screen_for(speakers: list[str]) -> Below | Beside:
    """The one that suits what is written to."""
    if console.is_terminal and console.width >= TWO_COLUMNS and len(speakers) > 1:
        return Beside()

    def write(text: str) -> None:
        console.file.write(text)
        console.file.flush()

    return Below(write)


def as_json(dialogue: Dialogue, prompt: str, answers: list[Answer]) -> str:
    """A line for a program."""
    said: dict[str, Any] = {
        "prompt": prompt,
        "system": dialogue.system,
        "temperature": dialogue.temperature,
        "seed": dialogue.seed,
        "answers": {a.who: {"text": a.text, "tokens": a.tokens, "finish": a.finish} for a in answers},
    }
    return json.dumps(said)
