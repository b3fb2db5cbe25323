"""Lessons: rows -> a prompt and the answers that somebody gave to it, in tokens: what SFT and DPO teach.

Knows nothing of losses, nor of models beyond their tokenizer.

Teacher(asker, ...)              a prompt of the task -> its lesson: a Group whose completions nobody sampled
build_lessons(teacher, ...)      those of a split, each looked at once before the run and made again when it comes

Where an answer comes from, the first that is there: the task's `gold`; a column `completion`; the messages of a
conversation behind the prompt's (grpo/conversations.py says in what forms). A pair is in the columns `chosen` and
`rejected`. Each is a text or chat messages.

A text is what the model is to say where the prompt ends, and the token that ends a turn is put behind it: what GRPO's
rewards would see. Messages go through the chat template. Templates that mark what the assistant wrote are rare, so the
marks are found by rendering beginnings: what is taught of message i is what the conversation up to and with it has
beyond the conversation before it, up to the first token that ends a turn. That is only right where a beginning is
rendered as it is in the whole, which is checked: some templates take the thinking out of earlier answers.
"""

from __future__ import annotations

import reprlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from grpo.chat_template import Rendered
from grpo.config import Config
from grpo.conversations import answer_in, is_whole, messages_of, side_in
from grpo.data import Indexed
from grpo.errors import UserError
from grpo.prompts import Asker
from grpo.task import fault_of_text
from grpo.types import Completion, Group, Message, Prompt, Span

NAMED = 4  # rows that cannot be taught, in a sentence
ROWS_BETWEEN_NOTES = 50_000
FRONTS = ("", "\n", "a", ".")  # what stands in front of a text that is to have the tokens of one that follows another
SAID = ("content", "reasoning_content", "reasoning", "thinking")  # the fields of a message that templates read

Answer = str | list[Message]  # what comes behind a prompt
Note = Callable[[str], object]


@dataclass(frozen=True)
class Teacher:
    """How the answers of a task's rows are shown to a model.

    stop      the tokens that end a completion
    end       the one of them that is put behind an answer that is a text
    longest   tokens that a prompt and one answer to it may have together
    every     every message of the assistant is taught, those of the prompt too
    lesson    the teacher and a prompt -> what is taught of it: `answer_of` or `pair_of`
    """

    asker: Asker
    stop: Sequence[int]
    end: int
    longest: int
    every: bool
    lesson: Callable[[Teacher, Prompt], Group]

    def __call__(self, prompt: Prompt) -> Group:
        """The lesson of a prompt.

        Raises:
            UserError: the row has none, or it cannot be shown to this model.
        """
        return self.lesson(self, prompt)

    def after(self, prompt: Prompt, answer: Answer) -> tuple[Prompt, Completion]:
        """An answer in tokens, and the prompt that it follows: the given one, or its beginning where the assistant's
        messages in it are taught too, or more than it where the answer begins with the words of others."""
        if isinstance(answer, str) and not (self.every and prompt.messages):
            self._check_ends(prompt, answer)
            tokens = self._tokens_after(prompt, answer)
            first = next((place for place, token in enumerate(tokens) if token in self.stop), len(tokens))
            return prompt, self._completion([*tokens[:first], *(tokens[first : first + 1] or [self.end])], ())
        if prompt.messages is None:
            raise UserError(
                f"The prompt of row {prompt.index} is a text and its answer chat messages. Give both as the same kind."
            )
        said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        messages = [*prompt.messages, *said]
        first = 0 if self.every else len(prompt.messages)
        taught = [i for i, message in enumerate(messages) if i >= first and is_taught(message)]
        for i in taught:
            self._check_ends(prompt, messages[i].get("content") or "")
        tokens, spans = self._rendered(prompt, messages, taught)
        start = spans[0].start
        others = tuple(Span(a.end - start, b.start - start) for a, b in pairwise(spans) if a.end < b.start)
        if taught[0] != len(prompt.messages):
            begun = tokens[:start]
            prompt = replace(prompt, tokens=begun, text=self._text(begun), messages=messages[: taught[0]])
        return prompt, self._completion(tokens[start : spans[-1].end], others)

    def _check_ends(self, prompt: Prompt, said: str) -> None:
        """Raises UserError where a turn ends in the middle of what is said: behind that nothing would be taught."""
        for end in self.ends:
            if end in said.rstrip().removesuffix(end):
                raise UserError(
                    f"row {prompt.index}: the answer has {end} in its text, the token that ends a turn. What comes "
                    "behind it would never be said. Give turns as messages, and no tokens of the template"
                )

    @cached_property
    def ends(self) -> list[str]:
        """How the tokens that end a completion are written."""
        return [text for token in self.stop if (text := self._text([token]).strip())]

    def _completion(self, tokens: list[int], others: tuple[Span, ...]) -> Completion:
        shown = tokens[:-1] if tokens[-1] in self.stop else tokens
        text = self.asker.tokenizer.decode(shown, skip_special_tokens=True)
        return Completion(tokens, [0.0] * len(tokens), text, "stop", policy_version=0, others=others)

    def _tokens_after(self, prompt: Prompt, text: str) -> list[int]:
        """The tokens of a text that follows a prompt, whose own tokens stay as they are: so they come in a rollout.

        Raises:
            UserError: there are none that read as the text does.
        """
        is_chat = prompt.messages is not None
        if self.asker.makes_tokens(is_chat):
            return self.asker.tokens_of([text], chat=True)[0]
        [whole] = self.asker.tokens_of([prompt.text + text], is_chat)
        if begins_with(whole, prompt.tokens):
            return whole[len(prompt.tokens) :]
        return self._apart(prompt, prompt.tokens, [text], whole)[0]

    def _apart(self, prompt: Prompt, begun: list[int], texts: list[str], whole: list[int]) -> list[list[int]]:
        """The tokens of texts that follow these tokens, each by itself, which together read as `whole` does. Some
        tokenizers put a blank in front of any text: they are shown it behind another, whose tokens are left out.

        Raises:
            UserError: there are none.
        """
        for front in FRONTS:
            [ahead] = self.asker.tokens_of([front], chat=True)
            parts = self.asker.tokens_of([front + text for text in texts], chat=True)
            behind = [part[len(ahead) :] for part in parts if begins_with(part, ahead)]
            joined = [*begun, *(token for part in behind for token in part)]
            if len(behind) == len(texts) and self._text(joined) == self._text(whole):
                return behind
        raise UserError(
            f"The tokenizer cannot cut the text of row {prompt.index} where an answer begins or ends: its parts have "
            "other tokens than the whole. Let the prompt end, and the answer begin, with a whole word."
        )

    def _rendered(self, prompt: Prompt, messages: list[Message], taught: list[int]) -> tuple[list[int], list[Span]]:
        """The tokens of a conversation, and where in them the messages stand that are taught.

        Raises:
            UserError: the template writes them otherwise where others follow, or its text cannot be cut there.
        """
        render = self.asker.template.render
        given = self.asker.given(prompt.index, prompt.fields)
        whole = render(prompt.index, messages, given, closed=True)
        edges: list[int] = []  # where each begins and ends, in the text, or in tokens where the template makes these
        for i in taught:
            is_last = i == len(messages) - 1
            before = render(prompt.index, messages[:i], given) if i else whole[:0]
            closed = whole if is_last else render(prompt.index, messages[: i + 1], given, closed=True)
            behind = whole if is_last else self._up_to_end(closed, len(before))
            if not (begins_with(whole, before) and begins_with(whole, behind) and len(before) <= len(behind)):
                raise UserError(self._rewritten(prompt, i))
            written = whole[len(before) : len(behind)]
            if isinstance(written, str) and any(lost(said, written) for said in said_in(messages[i])):
                raise UserError(self._left_out(prompt, i))
            edges += [len(before), len(behind)]
        if edges != sorted(edges):
            raise UserError(self._rewritten(prompt, taught[0]))
        tokens, places = self._cut(prompt, whole, edges)
        return self._ended(tokens, [Span(*pair) for pair in zip(places[::2], places[1::2], strict=True)])

    def _up_to_end(self, closed: Rendered, start: int) -> Rendered:
        """A conversation up to where the turn ends that begins at `start`: behind the last one of all some templates
        write another end."""
        if not isinstance(closed, str):
            return closed
        ends = [closed.index(end, start) + len(end) for end in self.ends if end in closed[start:]]
        return closed[: min(ends, default=len(closed))]

    def _ended(self, tokens: list[int], spans: list[Span]) -> tuple[list[int], list[Span]]:
        """Each message ends with the first token that ends a turn, which may be what the next turn begins with; the
        last one has one in any case."""
        are_ends = [token in self.stop for token in tokens]
        ended = [
            Span(start, are_ends.index(True, start) + 1 if any(are_ends[start : end + 1]) else end)
            for start, end in spans
        ]
        last = ended[-1]
        if tokens[last.end - 1] not in self.stop:
            tokens = [*tokens[: last.end], self.end]
            ended[-1] = Span(last.start, last.end + 1)
        return tokens, ended

    def _cut(self, prompt: Prompt, whole: Rendered, edges: list[int]) -> tuple[list[int], list[int]]:
        """Tokens of a rendered conversation, and the edges in them: as the model will meet them, who reads a beginning
        before it goes on."""
        if not isinstance(whole, str):
            return whole, edges
        tokens = self.asker.tokens_of([whole], chat=True)[0]
        beginnings = self.asker.tokens_of([whole[:edge] for edge in edges], chat=True)
        if all(tokens[: len(each)] == each for each in beginnings):
            return tokens, [len(each) for each in beginnings]
        # A token stands across an edge: the parts are tokens by themselves.
        texts = [whole[a:b] for a, b in pairwise([*edges, len(whole)])]
        parts = [beginnings[0], *self._apart(prompt, beginnings[0], texts, tokens)]
        places = [sum(map(len, parts[: i + 1])) for i in range(len(edges))]
        return [token for part in parts for token in part], places

    def _text(self, tokens: list[int]) -> str:
        return self.asker.tokenizer.decode(tokens, skip_special_tokens=False)

    def _left_out(self, prompt: Prompt, place: int) -> str:
        return (
            f"The model's chat template leaves out, or changes, what the assistant says in message {place} of row "
            f"{prompt.index}, as templates do with thinking or calls of tools: it would not be taught. Give "
            "prompt and completion as texts, or the thinking in the field that the template reads "
            "(`reasoning_content`, say), or leave out what this model cannot be shown."
        )

    def _rewritten(self, prompt: Prompt, place: int) -> str:
        return (
            f"The model's chat template writes message {place} of row {prompt.index} otherwise in the whole "
            "conversation than where the assistant begins or ends it, as templates do that leave out earlier "
            "thinking: what would be taught is not what the model reads later. Teach the last answer alone "
            "(--train-on answer), or give prompt and completion as texts."
        )


def is_taught(message: Message) -> bool:
    """What the assistant says is, but where the data give it the weight 0, as OpenAI's form of fine-tuning has it."""
    return message.get("role") == "assistant" and message.get("weight") != 0


def said_in(message: Message) -> list[str]:
    """What the assistant says in a message, in parts: its words, its thinking, the names of the tools that it calls."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or [] if isinstance(call, dict)]
    parts = [message.get(name) for name in SAID] + [call.get("name") for call in calls if isinstance(call, dict)]
    return [part for part in parts if isinstance(part, str)]


def lost(content: str, written: str) -> bool:
    """Whether something of a message is not among what a template wrote of it, white space aside."""
    return "".join(content.split()) not in "".join(written.split())


def begins_with(whole: Rendered, part: Rendered) -> bool:
    """Whether a text begins with a text, or tokens with tokens."""
    return whole[: len(part)] == part


# ---- what a row teaches


def answer_of(teacher: Teacher, prompt: Prompt) -> Group:
    """The lesson of SFT: one completion, of advantage 1."""
    answer = given_answer(teacher.asker, prompt)
    if answer == [] and prompt.messages:
        role = prompt.messages[-1].get("role")
        raise UserError(
            f"row {prompt.index}: the conversation ends with a message of the role {role!r}, and not with "
            "the assistant's answer"
        )
    if fault := fault_of_answer(answer):
        raise UserError(f"row {prompt.index}: the answer {fault}")
    prompt, completion = teacher.after(prompt, answer)
    return _group(prompt, [completion], [1.0])


def pair_of(teacher: Teacher, prompt: Prompt) -> Group:
    """The lesson of DPO: two completions, the better one first, of advantages 1 and -1."""
    sides = []
    for side in ("chosen", "rejected"):
        answer = behind(prompt, _read(prompt, side_in, side))
        if fault := fault_of_answer(answer):
            raise UserError(f"row {prompt.index}: `{side}` {fault}")
        sides.append(teacher.after(prompt, answer))
    prompts, (chosen, rejected) = [asked for asked, _ in sides], [said for _, said in sides]
    if prompts[0].tokens != prompts[1].tokens:
        raise UserError(
            f"row {prompt.index}: `chosen` and `rejected` answer different messages. Whatever comes before the first "
            "message of the assistant that differs must be the same in both"
        )
    if chosen.tokens == rejected.tokens:
        raise UserError(f"row {prompt.index}: `chosen` and `rejected` are the same, {chosen.text[:60]!r}")
    return _group(prompts[0], [chosen, rejected], [1.0, -1.0])


def _group(prompt: Prompt, completions: list[Completion], advantages: list[float]) -> Group:
    """Nobody scored it."""
    unscored = torch.full((len(completions),), torch.nan)
    return Group(prompt, completions, rewards=unscored, advantages=torch.tensor(advantages))


def given_answer(asker: Asker, prompt: Prompt) -> Any:
    """What a row's answer is, as it is there."""
    task, row = asker.task, prompt.fields
    if task.gold is not None:
        return task.gold_text(row)
    if (answer := _read(prompt, answer_in)) is not None:
        return behind(prompt, answer, is_whole(row)) if isinstance(answer, list) else answer
    there = [name for name, value in row.items() if value is not None]
    raise UserError(
        f"row {prompt.index}: there is no answer to learn from. Task {task.name} has no `gold`, and the row has "
        f"neither `completion` nor `messages`, but {', '.join(map(str, there)) or 'nothing'}"
    )


def _read(prompt: Prompt, read: Callable[..., Any], *names: str) -> Any:
    """What is read of the prompt's row, whose faults are told with it."""
    try:
        return read(prompt.fields, *names)
    except UserError as error:
        raise UserError(f"row {prompt.index}: {error}") from error


def behind(prompt: Prompt, said: Any, is_whole: bool = False) -> Any:
    """What comes behind the prompt: of messages that repeat it, and of a text where the row has no `prompt` of its own,
    so that it is what both texts of a pair begin with; all of what does not. is_whole: messages that must repeat it.

    Raises:
        UserError: messages go on with other words of the user's than those that the prompt ends with.
    """
    if not isinstance(said, list):
        implicit = prompt.text if prompt.messages is None and not prompt.fields.get("prompt") else ""
        return said.removeprefix(implicit) if isinstance(said, str) else said
    if not prompt.messages or not said or not all(isinstance(message, dict) for message in said):
        return said
    asked = _without_system(messages_of(prompt.messages, "prompt"))
    spoken = _without_system(said)
    if spoken[: len(asked)] == asked:
        return spoken[len(asked) :]
    if is_whole or (asked[-1].get("role") == spoken[0].get("role") == "user"):
        raise UserError(
            f"row {prompt.index}: the answer's messages begin with {reprlib.repr(said[0].get('content'))}, and neither "
            "repeat those of the prompt nor go on where it ends. Give the answer's alone"
        )
    return said


def _without_system(messages: list[Message]) -> list[Message]:
    """Messages without a system text in front: that may stand in the prompt alone, or another one there."""
    return messages[1:] if messages[0].get("role") == "system" else messages


def fault_of_answer(answer: Any) -> str:
    """Why an answer cannot be taught, in words; empty if it can."""
    if isinstance(answer, str):
        return fault if (fault := fault_of_text(answer)) and answer else "is empty" if not answer.strip() else ""
    if not isinstance(answer, list) or not all(isinstance(message, dict) for message in answer):
        return f"is {reprlib.repr(answer)}. It must be a text or chat messages"
    if not answer:
        return "is empty: nothing comes behind the prompt"
    if answer[-1].get("role") != "assistant":
        return f"ends with a message of the role {answer[-1].get('role')!r}. It must end with the assistant's"
    if not is_taught(answer[-1]):
        return "has the `weight` 0, and is not to be taught"
    for message in answer:
        content, calls = message.get("content"), message.get("tool_calls")
        if message.get("role") == "assistant" and not calls and not (isinstance(content, str) and content.strip()):
            return f"has an empty message of the assistant, {reprlib.repr(content)}"
        if not isinstance(content, str) and not (calls and content is None):
            return f"has a message whose content is {reprlib.repr(content)}. It must be text"
        if fault := fault_of_text(content or " "):
            return f"is {fault}"
    return ""


LESSONS: dict[str, Callable[[Teacher, Prompt], Group]] = {"sft": answer_of, "dpo": pair_of}


def build_teacher(asker: Asker, config: Config, stop: Sequence[int], end: int | None, context: int) -> Teacher:
    """The Teacher that a configuration asks for. stop: the tokens that end a completion; end: what the chat template
    puts behind an answer, where there is a chat. context: the longest sequence that the model takes."""
    own = asker.tokenizer.eos_token_id
    first = next(token for token in (end, own, *stop) if token is not None and token in stop)
    every = config.method == "sft" and config.train_on == "assistant"
    return Teacher(asker, stop, first, context, every, LESSONS[config.method])


# ---- those of a split


class Lessons(Indexed[Group]):
    """The lessons of these prompts, each made when it is asked for.

    longest            tokens of the longest prompt and one answer to it, at most
    longest_completion tokens of the longest answer
    num_tokens         that are taught, of all of them
    """

    def __init__(self, teacher: Teacher, prompts: Sequence[Prompt], places: Sequence[int]):
        self.teacher, self.prompts, self.places = teacher, prompts, places
        self.longest = self.longest_completion = self.num_tokens = 0

    def __len__(self) -> int:
        return len(self.places)

    def at(self, index: int) -> Group:
        """The lesson there."""
        return self.teacher(self.prompts[self.places[index]])


def build_lessons(teacher: Teacher, prompts: Sequence[Prompt], source: str, skip_bad_rows: bool, note: Note) -> Lessons:
    """The lessons of these prompts, less those that are too long for the model; `note` is told of these.

    skip_bad_rows: those that cannot be taught are left out too, and named.

    Raises:
        UserError: a row cannot be taught, or none is left.
    """
    lessons = Lessons(teacher, prompts, array("Q"))
    bad: list[str] = []
    long: list[str] = []
    num_bad = num_long = 0
    for place in range(len(prompts)):
        try:
            group = teacher(prompts[place])
        except UserError as error:
            num_bad += 1
            bad += [str(error)][: NAMED - len(bad)]
            continue
        longest = max(len(completion.tokens) for completion in group.completions)
        if (size := len(group.prompt.tokens) + longest) > teacher.longest:
            num_long += 1
            long += [f"row {group.prompt.index} with {size:,}"][: NAMED - len(long)]
            continue
        lessons.places.append(place)  # type: ignore
        lessons.longest = max(lessons.longest, size)
        lessons.longest_completion = max(lessons.longest_completion, longest)
        lessons.num_tokens += sum(completion.num_sampled for completion in group.completions)
        if (place + 1) % ROWS_BETWEEN_NOTES == 0:
            note(f"{place + 1:,} of {len(prompts):,} answers of {source} read")
    if bad and not (skip_bad_rows and lessons.places):
        raise UserError(_in_words(num_bad, len(prompts), source, bad))
    if bad:
        note(
            f"note: {_named(num_bad, bad)} of {source} left out, which cannot be taught: {'; '.join(bad).rstrip('.')}."
        )
    if long:
        told = (
            f"{_named(num_long, long)} of {source} left out, longer than {teacher.longest:,} tokens with the answer: "
        )
        note(
            f"note: {told}{', '.join(long)}{', ...' * (num_long > len(long))}. --max-context says how long they may be."
        )
    if not lessons.places:
        raise UserError(f"No row of {source} is left to learn from: all are longer than {teacher.longest:,} tokens.")
    return lessons


def _named(count: int, told: list[str]) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _in_words(count: int, of: int, source: str, bad: list[str]) -> str:
    told = "; ".join(bad).rstrip(".") + "; ..." * (count > len(bad))
    remedy = "Mend the data, or leave such rows out (--skip-bad-rows)."
    if count == of:
        remedy = (
            "None is left. Mend the data; where it is the test split, --held-out N takes N training rows in its place."
        )
    return f"{count:,} of {of:,} rows of {source} cannot be taught: {told}. {remedy}"
