"""Prompts: rows -> what is asked, through the chat template, in tokens. Knows nothing of rewards or of the order.

Asker                                   how the rows of a task are asked of a model
Survey                                  what every row asks, and how long it is, before a token is made of it
build_prompts(asker, rows, ...)         the prompts; with many rows they are made when they are asked for
"""

from __future__ import annotations

import heapq
import reprlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any

from grpo.data import Indexed
from grpo.errors import WHAT_USER_CODE_RAISES, UserError, in_words, user_code
from grpo.task import Row, Task, fault_of_text
from grpo.types import Message, Prompt
from grpo.watchdog import Limit, watchdog

# Up to so many prompts of a split are made, and checked, before the run. A million would take minutes and 10 GiB.
MADE_AT_ONCE = 10_000
# Of more, so many: the longest. The others are made when they are asked for.
LONGEST_MADE = 2_048
SPARE = 8  # tokens that a tokenizer may put in front of a text's own

# A chat template is code that comes with the model, and is run on every row.
TEMPLATE_LIMIT = Limit(
    60.0, "the longest that it may take", "Get the model anew, or let `prompt` of the task file return text."
)

Content = list[Message] | str  # what `prompt` of a task gives


@dataclass(frozen=True)
class Asker:
    """How the rows of a task are asked: its `prompt`, the chat template, the tokenizer.

    longest_prompt  the longest prompt allowed: the context less the completion, in tokens
    vocabulary      how many tokens the model can read
    """

    task: Task
    tokenizer: Any
    longest_prompt: int
    vocabulary: int

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
            content = self.task.prompt(dict(row))  # what it takes out of its row the rewards may still want
        if fault := fault_of_text(content) if isinstance(content, str) else self._fault_of_messages(content):
            raise UserError(
                f"`prompt` of task {self.task.name} gave {fault} for row {index}. It must return chat messages, a list "
                'such as [{"role": "user", "content": "..."}], or a text. Mend the row or `prompt` in the task file.'
            )
        if not isinstance(content, str) and not self.tokenizer.chat_template:
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
        asked = list(asked)
        texts = [self.render(index, content) for index, _, content in asked]
        chat = isinstance(asked[0][2], list)
        prompts = [
            Prompt(index, text, tokens, row, content if isinstance(content, list) else None)
            for (index, row, content), text, tokens in zip(asked, texts, self._tokens(texts, chat), strict=True)
        ]
        for prompt in prompts:
            if fault := self._fault_of_tokens(prompt, most):
                raise UserError(fault)
        return prompts

    def render(self, index: int, content: Content, **variables: Any) -> str:
        """The text of one prompt. variables: of the chat template.

        Where the chat template refuses a system message, as Gemma's does, the system text comes in front of the first
        message of the user, which is what such models are asked with.

        Raises:
            UserError: the template refuses the messages anyway.
        """
        if isinstance(content, str):
            return content
        # A field that is None is one that the message does not have; a template would take it for one that it has.
        messages = [{key: value for key, value in message.items() if value is not None} for message in content]
        goes_on = messages[-1]["role"] == "assistant"
        render = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            **variables,
        )
        in_time = partial(_watched, f"the model's chat template on row {index}", render)
        try:
            return in_time(messages)
        except WHAT_USER_CODE_RAISES as error:  # a template is the model's own code
            if not isinstance(error, TimeoutError):
                with suppress(*WHAT_USER_CODE_RAISES):
                    return in_time(_without_system(messages))
            raise UserError(
                f"The model's chat template refuses the messages of row {index}: {in_words(error)}. Their roles are "
                f"{', '.join(message['role'] for message in messages)}. Change `prompt` in the task file, or the model."
            ) from error

    def _tokens(self, texts: list[str], chat: bool) -> list[list[int]]:
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
        """What is wrong with chat messages, in words; empty if nothing is. A message may be empty, but not all."""
        if not isinstance(messages, list) or not messages:
            return f"{reprlib.repr(messages)} ({type(messages).__name__})"
        for message in messages:
            if not isinstance(message, dict):
                return f"the message {reprlib.repr(message)} ({type(message).__name__})"
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    return f"a message whose {key} is {reprlib.repr(message.get(key))}"
        if messages[-1]["role"] == "assistant" and not self.task.continue_final_message:
            return (
                "a conversation that ends with the assistant's own answer (leave that out, or say "
                "`continue_final_message=True` in the Task, and the completion goes on with it)"
            )
        return fault_of_text("".join(message["content"] for message in messages))

    def _fault_of_tokens(self, prompt: Prompt, most: int) -> str:
        if not prompt.tokens:
            return (
                f"The tokenizer makes no token of the prompt of row {prompt.index}, {prompt.text!r}. Leave the row out."
            )
        if len(prompt.tokens) > most:
            return (
                f"The prompt of row {prompt.index} has {len(prompt.tokens)} tokens, but only {most} fit beside a "
                "completion in the context. Lower --max-completion-tokens, raise --max-context, or leave the row out."
            )
        if (largest := max(prompt.tokens)) >= self.vocabulary:
            return (
                f"The tokenizer makes the token {largest} of row {prompt.index}, but the vocabulary in the model's "
                f"config.json has only {self.vocabulary}. Get the tokenizer that belongs to the model."
            )
        return ""


def _watched(what: str, render: Callable[..., str], messages: list[Message]) -> str:
    try:
        dog = watchdog()
    except OSError:  # the rewards, which need one more, say so
        return render(messages)
    return dog.call(TEMPLATE_LIMIT, what, render, {"conversation": messages})


def _without_system(messages: list[Message]) -> list[Message]:
    """The same messages with a leading system text put in front of the user's."""
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return messages
    system, user, *rest = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]


@dataclass
class Survey:
    """What each of R rows asks."""

    asker: Asker
    keys: array[int] = field(default_factory=lambda: array("Q"))  # [R], equal where the same is asked
    sizes: array[int] = field(default_factory=lambda: array("Q"))  # [R], bytes of it
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
        texts = [content] if isinstance(content, str) else [message["content"] for message in content]
        encoded = "\0".join(texts).encode()
        self.keys.append(int.from_bytes(blake2b(encoded, digest_size=8).digest()))
        self.sizes.append(len(encoded))

    def content(self, index: int, row: Row) -> Content:
        """What a row asks."""
        return self.contents[index] if index < len(self.contents) else self.asker.content(index, row)


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
