"""The chat template: messages -> the text that the model reads, or its tokens. Knows nothing of tasks, rows or rewards.

A template is code that comes with the model. It is run on every row, watched, and what it raises is told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import get_json_schema

from grpo.errors import WHAT_USER_CODE_RAISES, UserError, in_words, nearest, user_code
from grpo.types import Message
from grpo.watchdog import Limit, watchdog

TEMPLATE_LIMIT = Limit(
    60.0, "the longest that it may take", "Get the model anew, or let `prompt` of the task file return text."
)

# In front of a template: the date that it asks for is another. What follows it keeps its first new line.
ANOTHER_DAY = "{% macro strftime_now(form) %}another day{% endmacro %}{{ '' }}"

Rendered = str | list[int]


class ChatTemplate:
    """That of a tokenizer.

    makes_tokens    it makes tokens of messages itself, as those of mistral-common do; the others make a text, which
                    has all special tokens in it: their tokens are those of the text with nothing added
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.makes_tokens = type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template

    @property
    def is_there(self) -> bool:
        """Whether this model is asked with messages at all."""
        return self.makes_tokens or bool(self.tokenizer.chat_template)

    def render(
        self,
        index: int,
        messages: list[Message],
        variables: dict[str, Any],
        another_day: bool = False,
        closed: bool = False,
    ) -> Rendered:
        """The messages of row `index` as the model reads them, on this day or another one. variables: what the template
        reads beside them. closed: the conversation ends here; else the completion follows.

        Where the last message is the assistant's the completion goes on with it. Where the template refuses a system
        message, as Gemma's does, the system text comes in front of the first message of the user, which is what such
        models are asked with.

        Raises:
            UserError: the template refuses the messages anyway.
        """
        goes_on = messages[-1]["role"] == "assistant" and not closed
        own = self.tokenizer.get_chat_template(None, variables.get("tools")) if another_day else ""
        render = partial(
            self.tokenizer.apply_chat_template,
            tokenize=self.makes_tokens,
            return_dict=False,
            add_generation_prompt=not (goes_on or closed),
            continue_final_message=goes_on,
            **variables,
            **({"chat_template": ANOTHER_DAY + own} if another_day else {}),
        )
        in_time = partial(_watched, f"the model's chat template on row {index}", render)
        first, *others = _ways_to_ask(messages)
        try:
            return in_time(first)
        except WHAT_USER_CODE_RAISES as error:
            for other in others if not isinstance(error, TimeoutError) else []:
                with suppress(*WHAT_USER_CODE_RAISES):
                    return in_time(other)
            given = f", and it is given {', '.join(variables)}" if variables else ""
            raise UserError(
                f"The model's chat template refuses the messages of row {index}: {in_words(error)}. Their roles are "
                f"{', '.join(message['role'] for message in messages)}{given}. Change `prompt` in the task file, or "
                "the model."
            ) from error

    def ignores(self, name: str) -> str:
        """A sentence, if the template never reads a variable of this name: then nothing that it is given changes a
        prompt. Empty if it does, or where nobody can know."""
        source = getattr(self.tokenizer, "chat_template", None)
        texts = source.values() if isinstance(source, dict) else [source or ""]
        if not any(texts) or any(re.search(rf"\b{re.escape(name)}\b", text) for text in texts):
            return ""
        asked_for = {word for text in texts for word in re.findall(r"\b([A-Za-z_]\w*) is (?:not )?defined", text)}
        near = nearest(name, sorted(asked_for))
        return f"The model's chat template does not read {name}: it changes nothing.{near}"


def schemas(tools: Sequence[Callable | dict], told: Callable[[str], str]) -> list[dict[str, Any]]:
    """The JSON schemas of tools, as templates write them. told: what was raised, in words -> the sentence about it.

    Raises:
        UserError: a function has no docstring or no types to make one of.
    """
    with user_code(told):
        return [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools]


def _watched(what: str, render: Callable[..., Rendered], messages: list[Message]) -> Rendered:
    try:
        dog = watchdog()
    except OSError:  # the rewards, which need one more, say so
        return render(messages)
    return dog.call(TEMPLATE_LIMIT, what, render, {"conversation": messages})


def _ways_to_ask(messages: list[Message]) -> list[list[Message]]:
    """The same messages as templates want them, the first that one takes is what is asked.

    A field that is None is one that a message does not have: most templates would take it for one that it has. Some
    look for the None in a message without content, by which the assistant calls tools.
    """
    there = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return [there, *([messages] if there != messages else []), _without_system(there)]


def _without_system(messages: list[Message]) -> list[Message]:
    """The same messages with a leading system text put in front of the user's."""
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return messages
    system, user, *rest = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
