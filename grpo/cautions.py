"""Cautions: what happens to prompts and gold completions on their way to the model that a user may not expect.

None of it stops a run. Knows nothing of rewards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

from grpo.errors import UserError
from grpo.prompts import Asker
from grpo.types import Message, Prompt

_ANOTHER_CALL = {"id": "123456789", "type": "function", "function": {"name": "another", "arguments": {}}}
_TAG = re.compile(r"</?[^<>\s/]+>")
_OPENED = re.compile(r"<([A-Za-z][\w:-]*)>(?!.*</\1>)", re.DOTALL)  # a tag that nothing closes
_OPENED_AT_END = re.compile(r"(<[A-Za-z][\w:-]*>)\s*$")


def cautions(asker: Asker, prompts: Sequence[Prompt]) -> Iterator[str]:
    """A sentence for each thing that is so, about the first of the prompts that shows it."""
    checks = [_not_read, _dropped_text, _dropped_calls, _date_in_template, _another_time_another_prompt]
    if asker.task.gold is not None:
        checks += [_opened_twice, _tags_that_vanish]
    for check in checks:
        yield from [told for prompt in prompts if (told := check(asker, prompt))][:1]


def caution_of_answer(prompt: Prompt, said: str) -> str:
    """A sentence if what is taught behind a prompt does not fit the tag that the prompt ends inside of; else empty.
    said: the answer with its special tokens, as the model is to write it."""
    opened = opened_in(prompt)
    closed = opened.replace("<", "</")
    if not opened or (closed in said and opened not in said):
        return ""
    does = f"opens {opened} again" if opened in said else f"has no {closed}"
    return (
        f"The prompt of row {prompt.index} ends inside {opened}, and its answer {does}: so it is taught. Give what is "
        "said in there as the chat template reads it (`reasoning_content`, say); or begin a text with it, without "
        f"{opened} and with {closed}."
    )


def opened_in(prompt: Prompt) -> str:
    """The tag that is open where the prompt ends, so that the completion begins inside of it: "<think>", which the chat
    template, or the beginning of an answer, opened. Empty if none is.

    A question may speak of tags: so a tag that is not at the very end counts in an answer alone.
    """
    begun = prompt.messages[-1]["content"] if prompt.messages and prompt.messages[-1]["role"] == "assistant" else ""
    opened = [found[0] for found in _OPENED.finditer(begun)] or _OPENED_AT_END.findall(prompt.text)
    return opened[-1] if opened else ""


def _not_read(asker: Asker, prompt: Prompt) -> str:
    given = asker.given(prompt.index, prompt.fields)
    if prompt.messages is None and given:
        return (
            f"`prompt` of task {asker.task.name} gives text, which goes through no chat template: {', '.join(given)} "
            "changes nothing. Return chat messages."
        )
    return " ".join(filter(None, map(asker.template.ignores, given)))


def _dropped_text(asker: Asker, prompt: Prompt) -> str:
    # What an assistant said earlier is cut by some templates on purpose (its reasoning), so it is not looked for.
    asked = [message for message in prompt.messages or [] if message["role"] in ("system", "user")]
    dropped = next((message for message in asked if message["content"].strip() not in prompt.text), None)
    if dropped is None:
        return ""
    return (
        f"The model's chat template leaves out, or changes, what the {dropped['role']} says in row {prompt.index}: "
        f"{dropped['content'].strip()[:60]!r}. Say it in another message if the model should read it."
    )


def _dropped_calls(asker: Asker, prompt: Prompt) -> str:
    """Templates may write calls and what tools say as JSON, and a user may say the same: so it is looked whether the
    prompt changes with them."""
    messages = prompt.messages or []
    for place, message in enumerate(messages):
        if (other := _saying_more(message)) is None:
            continue
        with suppress(UserError):  # a template that wants it as it is
            changed = [*messages[:place], other, *messages[place + 1 :]]
            if asker.render(prompt.index, prompt.fields, changed) == asker.render(
                prompt.index, prompt.fields, messages
            ):
                return (
                    f"The model's chat template leaves out what message {place} of row {prompt.index}, of the role "
                    f"{message['role']!r}, says or calls: the model does not read it."
                )
    return ""


def _saying_more(message: Message) -> Message | None:
    """The message with another call of a tool, or another text of a role that not every template knows."""
    if message["role"] == "assistant" and message.get("tool_calls"):
        return {**message, "tool_calls": [*message["tool_calls"], _ANOTHER_CALL]}
    if message["role"] not in ("system", "user", "assistant") and isinstance(message.get("content"), str):
        return {**message, "content": message["content"] + " and more"}
    return None


def _date_in_template(asker: Asker, prompt: Prompt) -> str:
    if prompt.messages is None or asker.template.makes_tokens:  # whose own template has no date
        return ""
    if asker.render(prompt.index, prompt.fields, prompt.messages, another_day=True) == prompt.text:
        return ""
    by_hand = " --chat-template-kwargs date_string='26 Jul 2024' gives it one."
    return (
        "The model's chat template writes today's date into every prompt: a run that is resumed or evaluated on "
        f"another day asks other tokens.{'' if asker.template.ignores('date_string') else by_hand}"
    )


def _another_time_another_prompt(asker: Asker, prompt: Prompt) -> str:
    content = asker.content(prompt.index, prompt.fields)
    if content == (prompt.text if prompt.messages is None else prompt.messages):
        return ""
    return (
        f"`prompt` of task {asker.task.name} gives something else for row {prompt.index} each time it is called: a run "
        "that is resumed asks other prompts. Draw from a generator that the row itself seeds, such as "
        'random.Random(row["question"]).'
    )


def _opened_twice(asker: Asker, prompt: Prompt) -> str:
    opened = opened_in(prompt)
    if not opened or not asker.task.gold_text(prompt.fields).lstrip().startswith(opened):
        return ""
    return (
        f"The prompt of row {prompt.index} ends inside {opened}, and its gold completion begins with the tag again. A "
        "completion goes on where the prompt ends: leave the tag out of `gold`, and let no reward ask for it."
    )


def _tags_that_vanish(asker: Asker, prompt: Prompt) -> str:
    """Special tokens are left out of a completion's text, so a tag that is one is never seen by a reward."""
    gold = asker.task.gold_text(prompt.fields)
    tokens = asker.tokenizer(gold, add_special_tokens=False)["input_ids"]
    kept = asker.tokenizer.decode(tokens, skip_special_tokens=True)
    lost = sorted({tag for tag in _TAG.findall(gold) if tag not in kept})
    if not lost:
        return ""
    return (
        f"{', '.join(lost)} of the gold completion are special tokens of this model, which are left out of a "
        "completion's text: no reward will ever see them. Use other tags, or a model that writes these as text."
    )
