"""Prompts: rows -> what is asked, through the chat template, in tokens. Knows nothing of rewards or of the order.

Asker                                   how the rows of a task are asked of a model
Survey                                  what every row asks, and how long it is, before a token is made of it
short_enough(asker, rows, ...)          the rows whose prompts are no longer than the task wants them
build_prompts(asker, rows, ...)         the prompts; with many rows they are made when they are asked for
"""

from __future__ import annotations

import heapq
import json
import reprlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

from grpo.chat_template import ChatTemplate, schemas
from grpo.data import Indexed
from grpo.errors import UserError, user_code
from grpo.task import Row, Task, fault_of_kwargs, fault_of_text, fault_of_tools
from grpo.types import Message, Prompt

# Up to so many prompts of a split are made, and checked, before the run. A million would take minutes and 10 GiB.
MADE_AT_ONCE = 10_000
# Of more, so many: the longest. The others are made when they are asked for.
LONGEST_MADE = 2_048
MEASURED_AT_ONCE = 4_096  # where prompts that are too long are left out
SPARE = 8  # tokens that a tokenizer may put in front of a text's own

Content = list[Message] | str  # what `prompt` of a task gives


@dataclass(frozen=True)
class Asker:
    """How the rows of a task are asked: its `prompt`, the chat template and what that reads, the tokenizer.

    longest_prompt  the longest prompt allowed: the context less the completion, in tokens
    vocabulary      how many tokens the model can read
    variables       of the chat template, over the task's own
    """

    task: Task
    tokenizer: Any
    longest_prompt: int
    vocabulary: int
    variables: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template."""
        return ChatTemplate(self.tokenizer)

    def content(self, index: int, row: Row) -> Content:
        """What the task asks of a row.

        Raises:
            UserError: it is neither chat messages nor text, or the model's tokenizer has no chat template for messages.
        """
        with user_code(
            lambda raised: (
                f"`prompt` of task {self.task.name} raised {raised} on row {index}. The row has the columns "
                f"{', '.join(map(str, row)) or 'none'}."
            )
        ):
            try:
                content = self.task.prompt(dict(row))  # what it takes out of its row the rewards may still want
            except UserError as error:
                raise UserError(f"row {index}: {error}") from error
        if fault := fault_of_text(content) if isinstance(content, str) else self._fault_of_messages(content):
            raise UserError(
                f"`prompt` of task {self.task.name} gave {fault} for row {index}. It must return chat messages, a list "
                'such as [{"role": "user", "content": "..."}], or a text. Mend the row or `prompt` in the task file.'
            )
        if not isinstance(content, str) and not self.template.is_there:
            raise UserError(
                f"Task {self.task.name} asks with chat messages, but the model's tokenizer has no chat template. "
                "Use an instruct model, or let `prompt` return text."
            )
        return content

    def prompts(self, asked: Iterable[tuple[int, Row, Content]], most: int) -> list[Prompt]:
        """(index, row, what it asks) -> the prompts, none of more than `most` tokens.

        Raises:
            UserError: one is longer, has no token at all, or one that the model cannot read.
        """
        prompts = self.of_any_length(asked)
        for prompt in prompts:
            if fault := self._fault_of_tokens(prompt, most):
                raise UserError(fault)
        return prompts

    def of_any_length(self, asked: Iterable[tuple[int, Row, Content]]) -> list[Prompt]:
        """(index, row, what it asks) -> the prompts, which are not looked at yet."""
        asked = list(asked)
        rendered = [self.render(index, row, content) for index, row, content in asked]
        chat = isinstance(asked[0][2], list)
        if chat and self.template.makes_tokens:
            tokens, texts = rendered, [self.tokenizer.decode(each, skip_special_tokens=False) for each in rendered]
        else:
            tokens, texts = self.tokens_of(rendered, chat), rendered
        return [
            Prompt(index, text, list(of_prompt), row, content if isinstance(content, list) else None)
            for (index, row, content), text, of_prompt in zip(asked, texts, tokens, strict=True)
        ]

    def render(self, index: int, row: Row, content: Content, another_day: bool = False) -> Any:
        """What the model reads of one row: a text; or tokens, if the chat template makes these itself.

        Raises:
            UserError: the chat template refuses the messages, or what the task gives it is not as it must be.
        """
        if isinstance(content, str):
            return content
        return self.template.render(index, content, self.given(index, row), another_day)

    def given(self, index: int, row: Row) -> dict[str, Any]:
        """What the chat template reads of a row beside its messages.

        Raises:
            UserError: the task gives it something else than it must.
        """
        kwargs, tools = self.task.chat_template_kwargs, self.task.tools
        given = (
            self._of_row("chat_template_kwargs", kwargs, fault_of_kwargs, index, row) if callable(kwargs) else kwargs
        )
        if callable(tools):
            shown = self._schemas(self._of_row("tools", tools, fault_of_tools, index, row))
        else:
            shown = self._tools
        return {**given, **self.variables, **({"tools": shown} if shown else {})}

    def _of_row(
        self, name: str, function: Callable[[Row], Any], fault_of: Callable[[Any], str], index: int, row: Row
    ) -> Any:
        """What a field of the task that is a function gives for a row."""
        with user_code(lambda raised: f"`{name}` of task {self.task.name} raised {raised} on row {index}."):
            found = function(dict(row))
        if fault := fault_of(found):
            raise UserError(f"What `{name}` of task {self.task.name} gave for row {index} {fault}.")
        return found

    @cached_property
    def _tools(self) -> list[dict[str, Any]]:
        """The schemas of tools that are the same for every row."""
        return [] if callable(self.task.tools) else self._schemas(self.task.tools)

    def _schemas(self, tools: Sequence[Callable | dict]) -> list[dict[str, Any]]:
        return schemas(
            tools,
            lambda raised: (
                f"`tools` of task {self.task.name} cannot be shown to the model: {raised}. A function needs types and "
                'a docstring with a line "name: what it is" for each of its arguments under "Args:".'
            ),
        )

    def own_size(self, index: int, row: Row) -> int:
        """Bytes of what the chat template reads of this row alone, written at length."""
        if not (callable(self.task.chat_template_kwargs) or callable(self.task.tools)):
            return 0
        return len(json.dumps(self.given(index, row), indent=4, default=str).encode())

    def makes_tokens(self, chat: bool) -> bool:
        """Whether prompts come as tokens of which nobody knows the text: chats of some templates do."""
        return chat and self.template.makes_tokens

    def tokens_of(self, texts: list[str], chat: bool) -> list[list[int]]:
        """A chat template writes its special tokens itself. In front of a plain text come the tokenizer's own, unless
        it begins with them; behind it none, because the completion follows.
        """
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        front = [] if chat else self._front
        return [tokens if tokens[: len(front)] == front else front + tokens for tokens in encoded]

    @cached_property
    def _front(self) -> list[int]:
        """The tokens that the tokenizer puts in front of any text, such as Llama's <|begin_of_text|>."""
        bare = self.tokenizer("1 + 1", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("1 + 1")["input_ids"]
        first = whole[: whole[:1] == [self.tokenizer.bos_token_id]]  # if the text's own tokens are not found again
        return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(bare)] == bare), first)

    def _fault_of_messages(self, messages: Any) -> str:
        """What is wrong with chat messages, in words; empty if nothing is. A message may be empty, but not all; one
        with which the assistant calls tools may have no content."""
        if not isinstance(messages, list) or not messages:
            return f"{reprlib.repr(messages)} ({type(messages).__name__})"
        for message in messages:
            if not isinstance(message, dict):
                return f"the message {reprlib.repr(message)} ({type(message).__name__})"
            calls = message.get("role") == "assistant" and message.get("tool_calls") and message.get("content") is None
            for key in ("role", "content")[: 1 if calls and message is not messages[-1] else 2]:
                if not isinstance(message.get(key), str):
                    return f"a message whose {key} is {reprlib.repr(message.get(key))}"
        if messages[-1]["role"] == "assistant" and not self.task.continue_final_message:
            return (
                "a conversation that ends with the assistant's own answer (leave that out, or say "
                "`continue_final_message=True` in the Task, and the completion goes on with it)"
            )
        return fault_of_text("".join(_contents(messages)))

    def _fault_of_tokens(self, prompt: Prompt, most: int) -> str:
        if not prompt.tokens:
            return (
                f"The tokenizer makes no token of the prompt of row {prompt.index}, {prompt.text!r}. Leave the row out."
            )
        if len(prompt.tokens) > most:
            return (
                f"The prompt of row {prompt.index} has {len(prompt.tokens)} tokens, but only {most} fit beside a "
                "completion in the context. Lower --max-completion-tokens, raise --max-context, or leave such rows "
                f"out: `max_prompt_tokens={most}` in the Task."
            )
        if (largest := max(prompt.tokens)) >= self.vocabulary:
            return (
                f"The tokenizer makes the token {largest} of row {prompt.index}, but the vocabulary in the model's "
                f"config.json has only {self.vocabulary}. Get the tokenizer that belongs to the model."
            )
        return ""


def _contents(messages: list[Message]) -> list[str]:
    """What each message says."""
    return [message.get("content") or "" for message in messages]


def _size_of_calls(messages: list[Message]) -> int:
    """Bytes of the calls of tools in messages, written at length."""
    calls = [message["tool_calls"] for message in messages if message.get("tool_calls")]
    return len(json.dumps(calls, indent=4, default=str).encode()) if calls else 0


@dataclass
class Survey:
    """What each of R rows asks."""

    asker: Asker
    keys: array[int] = field(default_factory=lambda: array("Q"))  # [R], equal where the same is asked
    sizes: array[int] = field(default_factory=lambda: array("Q"))  # [R], bytes of it, and of what else is shown of it
    contents: list[Content] = field(default_factory=list)  # of the first rows

    def add(self, index: int, row: Row) -> None:
        """The next row.

        Raises:
            UserError: what it asks is not as it must be.
        """
        content = self.asker.content(index, row)
        if index < MADE_AT_ONCE:
            self.contents.append(content)
        if isinstance(content, list) != isinstance(self.contents[0], list):
            raise UserError(
                f"`prompt` of task {self.asker.task.name} gave chat messages for some rows and a text for others "
                f"(rows 0 and {index} differ). Return the same kind for every row."
            )
        texts = [content] if isinstance(content, str) else _contents(content)
        encoded = "\0".join(texts).encode()
        self.keys.append(int.from_bytes(blake2b(encoded, digest_size=8).digest()))
        beside = 0 if isinstance(content, str) else self.asker.own_size(index, row) + _size_of_calls(content)
        self.sizes.append(len(encoded) + beside)

    def content(self, index: int, row: Row) -> Content:
        """What a row asks."""
        return self.contents[index] if index < len(self.contents) else self.asker.content(index, row)


def short_enough(
    asker: Asker, rows: Sequence[Row], survey: Survey, indices: Sequence[int]
) -> tuple[Sequence[int], str]:
    """Of these rows those whose prompts are no longer than the task's `max_prompt_tokens`, and in words how many are.
    Without it they are all, and nothing is looked at.

    Raises:
        UserError: none is.
    """
    most = asker.task.max_prompt_tokens
    if most is None:
        return indices, ""
    kept = array("Q")
    left: list[Prompt] = []  # the first that is longer
    for start in range(0, len(indices), MEASURED_AT_ONCE):
        some = indices[start : start + MEASURED_AT_ONCE]
        prompts = asker.of_any_length((index, rows[index], survey.content(index, rows[index])) for index in some)
        kept.extend(prompt.index for prompt in prompts if len(prompt.tokens) <= most)
        left = left or [prompt for prompt in prompts if len(prompt.tokens) > most][:1]
    if not left:
        return indices, ""
    count = len(indices) - len(kept)
    told = (
        f"{count:,} of {len(indices):,} rows are left out, whose prompts have more than {most:,} tokens "
        f"(`max_prompt_tokens` of task {asker.task.name}), the first of them row {left[0].index} with "
        f"{len(left[0].tokens):,}"
    )
    if not kept:
        raise UserError(f"{told}: none is left. Raise `max_prompt_tokens` in the task file, or ask for less.")
    return kept, told


def build_prompts(
    asker: Asker, rows: Sequence[Row], survey: Survey, indices: Sequence[int]
) -> tuple[Sequence[Prompt], int]:
    """The prompts of the rows at these indices, and how many tokens the longest has at most.

    Up to MADE_AT_ONCE are made now. Of more, the longest are, as far as bytes tell; the others have no more tokens than
    bytes, because a token is at least one.

    Raises:
        UserError: a prompt is not as it must be.
    """

    def made(some: Iterable[int]) -> list[Prompt]:
        asked = ((index, rows[index], survey.content(index, rows[index])) for index in some)
        return asker.prompts(asked, asker.longest_prompt)

    largest = max(indices, key=survey.sizes.__getitem__)
    if survey.sizes[largest] > asker.longest_prompt:  # before minutes are spent on others that may be as long
        made([largest])
    if len(indices) <= MADE_AT_ONCE:
        prompts = made(indices)
        return prompts, max(len(prompt.tokens) for prompt in prompts)
    *longest, next_longest = heapq.nlargest(LONGEST_MADE + 1, indices, key=survey.sizes.__getitem__)
    prompts = made(longest)
    of_the_template = max(len(prompt.text.encode()) - survey.sizes[prompt.index] for prompt in prompts)
    bound = min(asker.longest_prompt, survey.sizes[next_longest] + of_the_template + SPARE)
    most = max(bound, *(len(prompt.tokens) for prompt in prompts))
    return Prompts(asker, rows, indices, most), most


class Prompts(Indexed[Prompt]):
    """The prompts of the rows at these indices, each made when it is asked for; none has more than `most` tokens."""

    def __init__(self, asker: Asker, rows: Sequence[Row], indices: Sequence[int], most: int):
        self.asker = asker
        self.rows = rows
        self.indices = indices
        self.most = most

    def __len__(self) -> int:
        return len(self.indices)

    def at(self, index: int) -> Prompt:
        """The prompt there."""
        of_row = self.indices[index]
        row = self.rows[of_row]
        [prompt] = self.asker.prompts([(of_row, row, self.asker.content(of_row, row))], self.most)
        return prompt
