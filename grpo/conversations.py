"""Conversations: rows of the forms that public data sets have -> what is asked, and what is answered. Knows nothing of
models.

asked_in(row), answer_in(row)       of a row with an answer, for SFT
asked_of_pair(row), side_in(...)    of a row with a better and a worse answer, for DPO
tools_in(row)                       the tools that either shows

A form is read where its columns have one meaning, and as its authors mean it:

    messages, conversations, conversation   chats of {role, content}, or of {from, value} as ShareGPT has them; texts in
                                            turn, the user's first, as LIMA has them
    text                                    a whole chat that begins with "### Human: ", as openassistant-guanaco has it
    prompt, completion                      texts or chats, as TRL has them
    instruction, input, output              Alpaca's; Dolly's with context and response; history and system beside them
    chosen, rejected                        texts, chats with the prompt or without, or one message each; asked by
                                            `prompt`, a chat, `question` or `instruction`, or by what both begin with

Whatever has two meanings is refused with the column, as any other fault of a row.
"""

from __future__ import annotations

import json
import re
import reprlib
from typing import TYPE_CHECKING, Any

from grpo.errors import UserError
from grpo.pairs import common_prompt
from grpo.task import Row

if TYPE_CHECKING:  # it comes with torch, which a task file has no use for
    from grpo.types import Message

CHATS = ("messages", "conversations", "conversation")
SYSTEMS = ("system", "system_prompt")
ANSWERS = ("output", "response")  # to an instruction: Alpaca's and Dolly's
CONTEXTS = ("input", "context")  # of an instruction
QUESTIONS = ("question", "instruction", "query", "input", "user_prompt", "problem")  # of pairs that do not repeat it
CALL = "function_call"  # the assistant's, with the call as JSON in its text
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bing", CALL), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
# Columns of forms that are not read: what they hold, and what is to be done about it.
FOREIGN = {
    ("message_id", "parent_id", "text"): "single messages of a tree, as OpenAssistant's have it: `joined` of "
    "grpo.trees makes chats of such rows",
    ("prompt", "completion", "label"): "answers with a thumb up or down, as KTO's have it",
    ("text",): "whole conversations in one text, it seems: say where the answer begins",
    ("chat",): "whole conversations in one text, it seems: say where the answer begins",
}
_SHOWN = re.compile(
    r"\s*(array\()?\[\{\s*['\"](role|from|content|value|weight|name)['\"]\s*:"
)  # messages, written as text
_SPEAKER = re.compile(r"\s*### (Human|Assistant):")
BRING = "`rows` of a task file brings any form, in three lines (docs/sft.md, Other forms)."


# ---- chat messages


def messages_of(value: Any, column: str) -> list[Message]:
    """A conversation -> chat messages of `role` and `content`, with what else their fields say.

    Raises:
        UserError: it is none, or has a message that cannot be read.
    """
    turns = _json(value) if isinstance(value, str) else value  # as CSV has it, which knows only text
    in_turn = column in CHATS and isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
    if in_turn and turns:
        return _in_turn(turns)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"`{column}` must be a list of chat messages, not {reprlib.repr(value)}{_hint(value)}")
    return [_message(turn, f"{column}[{place}]") for place, turn in enumerate(turns)]


def _in_turn(texts: list[str]) -> list[Message]:
    """What the user and the assistant say in turn."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def _in_text(text: str) -> list[Message]:
    """A chat in one text, which begins with "### Human: ".

    Raises:
        UserError: nobody knows who speaks, because a speaker follows himself.
    """
    _, *parts = _SPEAKER.split(text)
    speakers, said = parts[::2], parts[1::2]
    if speakers != [("Human", "Assistant")[place % 2] for place in range(len(speakers))]:
        raise UserError(f"`text` has not `### Human:` and `### Assistant:` in turn, but {', '.join(speakers)}. {BRING}")
    return _in_turn([each.strip() for each in said])


def _json(text: Any) -> Any:
    """What a text of JSON says; None where it is none."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None


def _hint(value: Any) -> str:
    """What to do about messages that were written as Python or numpy shows them, which a CSV of pandas has."""
    is_shown = isinstance(value, str) and _SHOWN.match(value)
    return (
        ". That is how Python shows a list: write it by json.dumps, or keep the rows as JSON lines" if is_shown else ""
    )


def _message(given: Row, place: str) -> Message:
    """One message. What has `role` and `content` already stays as it is, but for another name of its role."""
    speaker, content = _one_of(given, ("role", "from"), place), _one_of(given, ("content", "value"), place)
    if speaker is None:
        raise UserError(
            f"`{place}` has neither `role` nor `from`, but {', '.join(map(str, given)) or 'nothing'}. {BRING}"
        )
    if not isinstance(speaker, str) or (given.get("role") is None and _role(speaker) not in ROLES):
        raise UserError(
            f"`{place}` is of {reprlib.repr(speaker)}, and nobody knows who that is. Its `from` must be one of "
            f"{', '.join(ROLES)}"
        )
    content = _only_part(content)
    if given.get("from") is not None and not isinstance(content, str):
        raise UserError(f"`{place}` says {reprlib.repr(content)} ({type(content).__name__}). It must be text")
    rest = {name: field for name, field in given.items() if name not in ("role", "from", "content", "value")}
    if speaker.lower() == CALL:
        return {"role": "assistant", "content": "", **rest, "tool_calls": _calls(content, place)}
    if isinstance(calls := given.get("tool_calls"), list):
        rest["tool_calls"] = [_with_arguments(_without_none(call)) for call in calls]
    said = {"content": content} if content is not None or "content" in given else {}
    return {"role": _role(speaker), **said, **rest}


def _only_part(content: Any) -> Any:
    """A content of one part that is a text, as models that see have it, is that text."""
    if isinstance(content, list) and len(content) == 1 and isinstance(part := content[0], dict):
        return part.get("text", content) if part.get("type") == "text" else content
    return content


def _role(speaker: Any) -> Any:
    """The role of whoever is called so; a name that only a model's own template may know stays."""
    return ROLES.get(speaker.lower(), speaker) if isinstance(speaker, str) else speaker


def _one_of(given: Row, names: tuple[str, str], place: str) -> Any:
    """What a message says under one of two names.

    Raises:
        UserError: it says two things.
    """
    said = {name: given[name] for name in names if given.get(name) is not None}
    values = list(said.values())
    if len(values) > 1 and _role(values[0]) != _role(values[1]):
        told = " and ".join(f"`{name}` {reprlib.repr(value)}" for name, value in said.items())
        raise UserError(f"`{place}` has {told}, which are different. Leave one of them out")
    return values[0] if values else None


def _calls(text: Any, place: str) -> list[Row]:
    """The calls of tools that are written as JSON, one or a list, each with `name` and `arguments`.

    Raises:
        UserError: they are not.
    """
    held = _json(text)
    calls = held if isinstance(held, list) else [held]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise UserError(
            f"`{place}` calls a tool by {reprlib.repr(text)}. It must be JSON such as "
            '{"name": "add", "arguments": {"a": 1}}, or a list of these'
        )
    return [_with_arguments({"type": "function", "function": call}) for call in calls]


def _with_arguments(call: Any) -> Any:
    """A call whose arguments are an object: templates write them as JSON, and of JSON in a text would write a text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not (isinstance(function, dict) and isinstance(function.get("arguments"), str)):
        return call
    arguments = _json(function["arguments"])
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _chat_in(row: Row) -> list[Message] | None:
    """The conversation of a row, with its system text; None where it has none.

    Raises:
        UserError: it has two that differ.
    """
    found = {name: messages_of(row[name], name) for name in CHATS if row.get(name) is not None}
    if not found and _is_chat_in_text(row):
        found = {"text": _in_text(row["text"])}
    if len(found) > 1 and any(chat != next(iter(found.values())) for chat in found.values()):
        raise UserError(f"{' and '.join(f'`{name}`' for name in found)} are different conversations. Leave one out")
    return _with_system(row, next(iter(found.values()))) if found else None


def _is_chat_in_text(row: Row) -> bool:
    """Whether the column `text` is a whole chat."""
    return isinstance(row.get("text"), str) and row["text"].lstrip().startswith("### Human:")


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The messages behind the system text of a column, unless they begin with one of their own.

    Raises:
        UserError: two columns have one, or it is no text.
    """
    texts = {name: row[name] for name in SYSTEMS if row.get(name) not in (None, "")}
    if messages[0].get("role") == "system" or not texts:
        return messages
    if wrong := next((name for name, text in texts.items() if not isinstance(text, str)), ""):
        raise UserError(f"`{wrong}` is {reprlib.repr(texts[wrong])}. It must be text")
    if len(set(texts.values())) > 1:
        raise UserError("`system` and `system_prompt` are different. Leave one of them out")
    return [{"role": "system", "content": next(iter(texts.values()))}, *messages]


def _asked_with(row: Row, question: Any, column: str) -> list[Message]:
    """A question that is a text as a chat: behind the system text and the earlier rounds of the row.

    Raises:
        UserError: one of these is not as it must be.
    """
    if not isinstance(question, str):
        raise UserError(f"`{column}` is {reprlib.repr(question)} ({type(question).__name__}). It must be text")
    history = row.get("history") or []
    rounds = [list(each) for each in history if isinstance(each, list | tuple)] if isinstance(history, list) else []
    if not isinstance(history, list) or len(rounds) < len(history) or any(len(each) != 2 for each in rounds):
        raise UserError(f"`history` is {reprlib.repr(history)}. It must be a list of [question, answer]")
    earlier = _in_turn([text for each in rounds for text in each])
    return _with_system(row, [*earlier, {"role": "user", "content": question}])


def _instruction(row: Row) -> list[Message]:
    """The question of a row with `instruction`: what it is about stands behind it, as Alpaca's own prompt has it."""
    names = ["instruction", *(name for name in CONTEXTS if row.get(name) not in (None, ""))]
    if len(names) > 2:
        raise UserError("`input` and `context` are both filled, and nobody knows how they are asked. Leave one out")
    if wrong := next((name for name in names if not isinstance(row[name], str)), ""):
        raise UserError(f"`{wrong}` is {reprlib.repr(row[wrong])}. It must be text")
    return _asked_with(row, "\n\n".join(row[name] for name in names if row[name].strip()), "instruction")


def _prompt(row: Row, is_chat: bool) -> list[Message] | str:
    """The column `prompt`: a text stays one where nothing says that it is part of a chat."""
    prompt = row["prompt"]
    if isinstance(prompt, list) or _is_written(prompt):
        return _with_system(row, messages_of(prompt, "prompt"))
    if isinstance(prompt, str) and (is_chat or any(name in row for name in (*SYSTEMS, "history"))):
        return _asked_with(row, prompt, "prompt")
    return prompt


def _said(value: Any, column: str) -> Any:
    """An answer: chat messages, of which one may stand alone; what else it is stays as it is."""
    if _is_written(value):
        return messages_of(value, column)
    if isinstance(value, dict):
        return [_message(value, column)]
    is_chat = isinstance(value, list) and value and all(isinstance(message, dict) for message in value)
    return messages_of(value, column) if is_chat else value


def _is_written(value: Any) -> bool:
    """Whether a text is messages, written as JSON or as Python shows them: nobody says that to a model."""
    return isinstance(value, str) and bool(_SHOWN.match(value))


# ---- a row with an answer


def asked_in(row: Row) -> list[Message] | str:
    """What a row asks whose answer is taught.

    Raises:
        UserError: its form is not known, or it has two meanings.
    """
    there = {name: value for name, value in row.items() if value is not None}  # a column that other rows have
    if "prompt" in there and "completion" in there:
        _check_good(there)
        return _prompt(row, is_chat=not isinstance(_said(there["completion"], "completion"), str))
    if "completion" not in there and (chat := _chat_in(there)) is not None:
        asked = chat[:-1] if chat[-1].get("role") == "assistant" else chat
        if not asked:
            raise UserError("the conversation has the assistant's message alone, which answers nothing")
        return asked
    if "completion" not in there and _answer_of_instruction(there):
        return _instruction(there)
    raise UserError(
        "Rows to learn from have `messages` or `conversations`, chats such as "
        '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], or `prompt` and '
        f"`completion`, or `instruction` and `output`; these have {', '.join(map(str, there)) or 'nothing'}."
        f"{_foreign(row)} --columns prompt=NAME completion=NAME says which columns are meant; {BRING}"
    )


def answer_in(row: Row) -> Any:
    """The answer of a row, or the whole conversation that it ends; None where there is none."""
    if row.get("completion") is not None:
        return _said(row["completion"], "completion")
    chat = _chat_in(row)
    if chat is None and (name := _answer_of_instruction(row)):
        return row[name]
    return chat


def is_whole(row: Row) -> bool:
    """Whether `answer_in` gives a conversation from its beginning on."""
    is_chat = any(row.get(name) is not None for name in CHATS) or _is_chat_in_text(row)
    return row.get("completion") is None and is_chat


def _answer_of_instruction(row: Row) -> str:
    """The column with the answer to an `instruction`; empty where there is none, or nobody knows which."""
    names = [name for name in ANSWERS if row.get(name) is not None]
    return names[0] if row.get("instruction") is not None and len(names) == 1 else ""


def _check_good(row: Row) -> None:
    if "label" in row and str(row["label"]).lower() in ("false", "0", "0.0"):  # as CSV and tables of numbers have it
        raise UserError(
            f"`label` is {row['label']}, which says of the answer that it is a bad one, as KTO's data sets do. Leave "
            "it out"
        )


def _foreign(row: Row) -> str:
    """What the columns of an unknown form hold, in a sentence; empty where nobody knows."""
    told = next((told for names, told in FOREIGN.items() if set(names) <= row.keys()), "")
    return f" They are {told}." if told else ""


# ---- a row with two answers


def asked_of_pair(row: Row) -> list[Message] | str:
    """What both answers were given to.

    Raises:
        UserError: nobody knows what, or one of them is missing.
    """
    if lacking := [name for name in ("chosen", "rejected") if row.get(name) is None]:
        there = [name for name, value in row.items() if value is not None]
        raise UserError(
            f"Rows of pairs have `chosen` and `rejected`, and `prompt` or not; these have {', '.join(map(str, there))}."
            f"{_foreign(row)} --columns {lacking[0]}=NAME says which column is meant; {BRING}"
        )
    sides = [_side(row, name) for name in ("chosen", "rejected")]
    chats = [side for side in sides if isinstance(side, list)]
    if len(chats) == 2 and not all(map(_is_answer, chats)):  # whole chats, which say themselves what was asked
        if isinstance(row.get("prompt"), list) and row["prompt"]:
            return _prompt(row, is_chat=True)
        return _with_system(row, common_prompt(*sides))
    if row.get("prompt"):
        return _prompt(row, is_chat=len(chats) == 2)
    if (chat := _chat_in(row)) and chat[-1].get("role") == "assistant":
        raise UserError(
            "The conversation ends with the assistant's message, and `chosen` and `rejected` are answers to one of the "
            "user's. Leave it out there, or give whole chats in `chosen` and `rejected`"
        )
    return chat or _question(row) or common_prompt(*sides)


def side_in(row: Row, name: str) -> Any:
    """One of the two answers."""
    return _said(row.get(name), name)


def _side(row: Row, name: str) -> list[Message] | str:
    """One of the two answers, which is one.

    Raises:
        UserError: it is neither text nor messages.
    """
    side = side_in(row, name)
    is_chat = isinstance(side, list) and side and all(isinstance(message, dict) for message in side)
    if not (is_chat or isinstance(side, str)):
        raise UserError(f"`{name}` is {reprlib.repr(side)}. It must be a text or chat messages")
    return side


def _is_answer(side: list[Message]) -> bool:
    """Whether messages are an answer alone, and not the conversation that it ends."""
    return side[0].get("role") == "assistant"


def _question(row: Row) -> list[Message]:
    """The question of a column that is called so; empty where there is none.

    Raises:
        UserError: there are several.
    """
    names = [name for name in QUESTIONS if row.get(name) not in (None, "")]
    if "instruction" in names and set(names) <= {"instruction", "input"}:
        return _instruction(row)
    if len(names) > 1:
        raise UserError(
            f"Both {' and '.join(f'`{name}`' for name in names)} may be what was asked. Say which: "
            f"--columns prompt={names[0]}"
        )
    return _asked_with(row, row[names[0]], names[0]) if names else []


# ---- tools


def tools_in(row: Row) -> Any:
    """The tools of a row: data sets that cannot hold a schema hold it as text."""
    given = row.get("tools") or []
    return json.loads(given) if isinstance(given, str) else _without_none(given)


def _without_none(value: Any) -> Any:
    """The same without fields that are None: a table gives each of its rows the fields of all."""
    if isinstance(value, dict):
        return {name: _without_none(each) for name, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value
