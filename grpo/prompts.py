"""Prompts: rows -> what is asked, through the chat template, in tokens. Knows nothing of rewards or of the order.

build_prompts(task, rows, tokenizer, room)    none longer than the context allows
"""

from __future__ import annotations

import reprlib
from contextlib import suppress
from functools import partial
from typing import Any

from grpo.errors import WHAT_USER_CODE_RAISES, UserError, in_words, user_code
from grpo.task import Row, Task, fault_of_text
from grpo.types import Message, Prompt


def build_prompts(task: Task, rows: list[Row], tokenizer: Any, room: int) -> list[Prompt]:
    """Rows as prompts: messages through the chat template, then tokens.

    room: the longest prompt allowed, i.e. the context less the completion, in tokens.

    Raises:
        UserError: `prompt` gave no text, a prompt is longer than that, or the model has no chat template that takes the
            messages.
    """
    contents = [_content(task, index, row) for index, row in enumerate(rows)]
    chat = isinstance(contents[0], list)
    other = next((index for index, content in enumerate(contents) if isinstance(content, list) != chat), None)
    if other is not None:
        raise UserError(
            f"`prompt` of task {task.name} gave chat messages for some rows and a text for others (rows 0 and {other} "
            "differ). Return the same kind for every row."
        )
    if chat and not tokenizer.chat_template:
        raise UserError(
            f"Task {task.name} asks with chat messages, but the model's tokenizer has no chat template. "
            "Use an instruct model, or let `prompt` return text."
        )
    texts = [_render(tokenizer, index, content) for index, content in enumerate(contents)]
    encoded = tokenizer(texts, add_special_tokens=not chat)["input_ids"]
    prompts = [
        Prompt(index, text, tokens, row, content if isinstance(content, list) else None)
        for index, (text, tokens, row, content) in enumerate(zip(texts, encoded, rows, contents, strict=True))
    ]
    longest = max(prompts, key=lambda prompt: len(prompt.tokens))
    empty = next((prompt.index for prompt in prompts if not prompt.tokens), None)
    if empty is not None:
        raise UserError(
            f"The tokenizer makes no token of the prompt of row {empty}, {texts[empty]!r}. Leave the row out."
        )
    if len(longest.tokens) > room:
        raise UserError(
            f"The prompt of row {longest.index} has {len(longest.tokens)} tokens, but only {room} fit beside a "
            "completion in the context. Lower --max-completion-tokens, raise --max-context, or leave the row out."
        )
    return prompts


def _content(task: Task, index: int, row: Row) -> list[Message] | str:
    with user_code(
        lambda raised: (
            f"`prompt` of task {task.name} raised {raised} on row {index}. The row has the columns "
            f"{', '.join(map(str, row))}."
        )
    ):
        content = task.prompt(row)
    fault = fault_of_text(content) if isinstance(content, str) else _fault_of_messages(content)
    if fault:
        raise UserError(
            f"`prompt` of task {task.name} gave {fault} for row {index}. It must return chat messages, a list such as "
            '[{"role": "user", "content": "..."}], or a text. Mend the row or `prompt` in the task file.'
        )
    return content


def _fault_of_messages(messages: Any) -> str:
    """What is wrong with chat messages, in words; empty if nothing is. A message may be empty, but not all of them."""
    if not isinstance(messages, list) or not messages:
        return f"{reprlib.repr(messages)} ({type(messages).__name__})"
    for message in messages:
        if not isinstance(message, dict):
            return f"the message {reprlib.repr(message)} ({type(message).__name__})"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                return f"a message whose {key} is {reprlib.repr(message.get(key))}"
    return fault_of_text("".join(message["content"] for message in messages))


def _render(tokenizer: Any, index: int, content: list[Message] | str) -> str:
    """The text of one prompt.

    Where the chat template refuses a system message, as Gemma's does, the system text comes in front of the first
    message of the user, which is what such models are asked with.

    Raises:
        UserError: the template refuses the messages anyway.
    """
    if isinstance(content, str):
        return content
    render = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    try:
        return render(content)
    except WHAT_USER_CODE_RAISES as error:  # a template is the model's own code
        with suppress(*WHAT_USER_CODE_RAISES):
            return render(_without_system(content))
        raise UserError(
            f"The model's chat template refuses the messages of row {index}: {in_words(error)}. Their roles are "
            f"{', '.join(message['role'] for message in content)}. Change `prompt` in the task file, or the model."
        ) from error


def _without_system(messages: list[Message]) -> list[Message]:
    """The same messages with a leading system text put in front of the user's."""
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return messages
    system, user, *rest = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
