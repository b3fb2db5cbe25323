"""Dialogue: a conversation with the base and one with the trained policy, each with its own answers.
Knows no screen."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

from grpo.chat.answers import tokens_of
from grpo.chat.trained import Trained
from grpo.chat.voice import Heard, Voice
from grpo.chat_template import ChatTemplate
from grpo.errors import UserError
from grpo.seeds import Purpose, mix_seed
from grpo.types import Message

BASE, TRAINED, MODEL = "base", "trained", "model"
HOTTEST = 1e4  # as Config has it
COLDEST = 1e-4  # above 0, which means the likeliest token
COMMANDS = "/temperature X   /system TEXT   /reset   /quit   (a prompt that begins with a slash: write two)"

# who -> told the whole text so far
Listening = Callable[[str], Heard]


@dataclass(frozen=True)
class Answer:
    """What one of them said."""

    who: str
    text: str
    tokens: int
    finish: str  # stop, length, or interrupted


@dataclass
class Dialogue:
    """The conversation, and how it is sampled."""

    trained: Trained
    temperature: float
    max_tokens: int
    seed: int = 0
    system: str = ""
    with_base: bool = True
    history: dict[str, list[Message]] = field(default_factory=dict)  # who -> what was said, without the system prompt
    turn: int = 0

    def __post_init__(self) -> None:
        self.temperature = checked_temperature(self.temperature)
        self.voice = Voice(self.trained.policy, self.trained.tokenizer)
        self.template = ChatTemplate(self.trained.tokenizer)
        both = self.trained.has_adapter and self.with_base
        self.speakers = [BASE, TRAINED] if both else [TRAINED if self.trained.has_adapter else MODEL]
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.history = {who: [] for who in self.speakers}
        self.turn = 0

    def ask(self, prompt: str, listening: Listening, interrupted: Callable[[], object]) -> list[Answer]:
        """Each answers the prompt. interrupted: called where Ctrl-C ended an answer; it may raise.

        Raises:
            UserError: the prompt is empty, or longer than the model's context; then nothing was said.
        """
        contexts = {who: self._context(who, prompt) for who in self.speakers}
        answers = []
        for who in self.speakers:
            answers.append(self._answer(who, contexts[who], listening(who)))
            self.history[who] += [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answers[-1].text},
            ]
            if answers[-1].finish == "interrupted":
                interrupted()
        self.turn += 1
        return answers

    def _answer(self, who: str, context: list[int], heard: Heard) -> Answer:
        room = min(self.max_tokens, self.trained.context - len(context))
        seed = mix_seed(Purpose.EVALUATION, self.seed, self.turn)
        alone = self.trained.policy.store.reference() if who == BASE else nullcontext()
        try:
            with alone:
                made = self.voice.answer(context, seed, room, self.temperature, heard)
        except KeyboardInterrupt:
            return Answer(who, self.voice.so_far(), len(self.voice.tokens), "interrupted")
        heard(made.text)
        return Answer(who, made.text, len(made.tokens), made.finish)

    def _context(self, who: str, prompt: str) -> list[int]:
        """The tokens of all that was said, and of the prompt."""
        said = [*self.history[who], {"role": "user", "content": prompt}]
        if not prompt.strip():
            raise UserError("The prompt is empty. Write something.")
        said = [{"role": "system", "content": self.system}, *said] if self.system else said
        tokens = tokens_of(self.trained, self.template, said, self.turn)
        if len(tokens) >= self.trained.context:
            raise UserError(
                f"The conversation is {len(tokens):,} tokens long, and the model's context has "
                f"{self.trained.context:,}. /reset begins a new one."
            )
        return tokens

    # ---- commands

    def command(self, line: str) -> str:
        """Do what a line that begins with a slash says; returns what to tell.

        Raises:
            UserError: there is no such command, or not with such a value.
        """
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/reset":
            self.reset()
            return "A new conversation."
        if name == "/temperature":
            self.temperature = checked_temperature(value) if value else self.temperature
            return f"temperature {self.temperature:g}"
        if name == "/system":
            self.system = value
            self.reset()
            return f"{'A new' if value else 'No'} system prompt, and a new conversation."
        if name == "/help":
            return COMMANDS
        raise UserError(f"There is no {name} here. {COMMANDS}")


def checked_temperature(said: object) -> float:
    """A temperature.

    Raises:
        UserError: it is none.
    """
    try:
        value = float(str(said))
    except ValueError:
        value = math.nan
    if value != 0 and not COLDEST <= value <= HOTTEST:
        raise UserError(
            f"The temperature is {said}. Use 0, which takes the likeliest token, or a number from {COLDEST:g} to "
            f"{HOTTEST:g}."
        )
    return value
