"""Scaffold: the text of a task file for data whose columns are known. Knows nothing of how they were guessed.

source_of(found)     the file, as a person would write it
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo.guess import LETTERS, Columns, Kind, quoted

REWARDS: dict[Kind, tuple[str, str]] = {  # the reward, and what the answers are in words
    "number": ("number", "a number"),
    "hash": ("number", "a solution that ends in `#### number`"),
    "boxed": ("math", "a solution with its answer in a box"),
    "math": ("math", "a formula"),
    "letter": ("choice", "the letter of a choice"),
    "index": ("choice", "the place of a choice among the options, counted from 0"),
    "option": ("choice", "one of the options, word by word"),
    "label": ("correctness", "one of a few labels"),
    "text": ("correctness", "a short text, compared word by word"),
    "long": ("similarity", "a long text"),
    "none": ("todo", "nothing"),
}
FULL_MARKS = {"correctness": 2.0}  # of the others it is 1
NOTHING_RIGHT = ("long", "none")  # kinds of answers that tell no right from wrong


@dataclass(frozen=True)
class Found:
    """What is known of the data when the file is written."""

    name: str
    data: str  # as Python writes it
    columns: Columns
    kind: Kind
    held_out: int | None
    splits: tuple[str, ...]
    labels: tuple[str, ...] = ()  # of answers that are labels
    has_bad_rows: bool = False  # without a question or an answer

    @property
    def asks_for_tags(self) -> bool:
        """The prompt asks for <reasoning> and <answer>; chat messages that come with the data ask as they do."""
        return not self.columns.chat and self.kind not in NOTHING_RIGHT

    @property
    def has_options(self) -> bool:
        """Options are among the columns, and the answer is one of them."""
        return self.kind in ("letter", "index", "option") and bool(self.columns.options or self.columns.lettered)


def source_of(found: Found) -> str:
    """The text of the task file."""
    parts = [_docstring(found), _imports(found), *([f"LETTERS = {quoted(LETTERS)}\n"] if found.has_options else [])]
    parts += [f"LABELS = {', '.join(map(quoted, found.labels))}\n"] if found.kind == "label" else []
    functions = [_rows(found.columns, found), _prompt(found), *([TODO_REWARD] if found.kind == "none" else [])]
    return "\n".join(parts) + "\n\n" + "\n\n\n".join([*functions, _task(found)]) + "\n"


TODO_REWARD = '''def todo(completion, question):
    """TODO: a number for a completion, higher for a better one."""
    raise NotImplementedError("say in this file what a good completion is")'''


def _docstring(found: Found) -> str:
    question, answer = (path.name if path else "TODO" for path in (found.columns.question, found.columns.answer))
    told = f"The question is {question}, the answer {answer}: {REWARDS[found.kind][1]}."
    told = "".join(each if each.isprintable() else "?" for each in told.replace("\\", "/").replace('"', "'"))
    return f'"""{found.name}: written by `python -m grpo.new`. Change what it guessed wrong.\n\n{told}\n"""\n'


def _imports(found: Found) -> str:
    rewards = [] if found.kind == "none" else [REWARDS[found.kind][0]]
    rewards += ["XML_FORMAT", "soft_xml"] if found.asks_for_tags else []
    rewards.sort(key=lambda name: (not name.isupper(), name))  # constants first, as linters have it
    lines = [
        *(["from pathlib import Path", ""] if found.data.startswith("str(Path") else []),
        "from grpo import Config, Task",
        *(["from grpo.conversations import messages_of"] if found.columns.chat_says_from else []),
        "from grpo.data import read_rows",
        *([f"from grpo.rewards import {', '.join(rewards)}"] if rewards else []),
        *(["from grpo.rewards.stated import last_box"] if found.kind == "boxed" else []),
    ]
    return "\n".join(lines) + "\n"


def _rows(columns: Columns, found: Found) -> str:
    question = f"question = {columns.question.source}" if columns.question else 'question = row["TODO"]  # which one?'
    if columns.chat_is_answered:
        question += "[:-1]"
    lines = [question]
    if columns.context and not columns.chat:
        lines.append(f'question = f"{{{columns.context.source.replace(chr(34), chr(39))}}}\\n\\n{{question}}".strip()')
    given = columns.answer.source if columns.answer and found.kind != "none" else ""
    if found.has_options:
        lines += _options(columns)
    if found.kind == "label" and not columns.chat:
        lines.append("question = f\"{question}\\n\\nAnswer with one of: {', '.join(LABELS)}\"")
    if found.kind == "hash":
        lines.append(f'answer = {given}.rpartition("####")[2].strip()')
    elif found.kind == "boxed":
        lines.append(f"answer = last_box({given})")
    elif found.kind == "index" and found.has_options:
        lines.append(f"answer = LETTERS[int({given})]")
    elif found.kind == "option" and found.has_options:
        lines.append(f"answer = LETTERS[options.index(str({given}).strip())]")
    elif found.kind == "label":
        lines.append(f"answer = None if {given} is None else str({given}).strip()")
    elif given:
        lines.append(f"answer = {given}")
    answer = ', "answer": answer' if given else ""
    lines.append(f'yield {{"question": question{answer}}}')
    body = "\n".join(f"        {line}" for line in lines)
    return f"def rows(split, data):\n    for row in read_rows(data, split):\n{body}"


def _options(columns: Columns) -> list[str]:
    """Lines that put the options under the question, each with its letter; chat messages show them already."""
    if columns.options:
        held = columns.options.source + ('["text"]' if columns.options_have_text else "")
        lines = [f"options = [str(option).strip() for option in {held}]"]
    else:
        lines = [f"options = [str(row[name]).strip() for name in {list(columns.lettered)!r}]"]
    if columns.chat:
        return lines
    return [
        *lines,
        'listed = "\\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))',
        'question = f"{question}\\n\\n{listed}"',
    ]


def _prompt(found: Found) -> str:
    if found.columns.chat and found.columns.chat_says_from:
        return 'def prompt(row):\n    return messages_of(row["question"], "question")'
    if found.columns.chat:
        return 'def prompt(row):\n    return row["question"]'
    system = '{"role": "system", "content": XML_FORMAT}, ' if found.asks_for_tags else ""
    return f'def prompt(row):\n    return [{system}{{"role": "user", "content": row["question"]}}]'


def _task(found: Found) -> str:
    reward = REWARDS[found.kind][0]
    solved = f"({quoted(reward)}, {FULL_MARKS.get(reward, 1.0)})"
    more = f", splits={found.splits!r}" * bool(found.splits) + ", skip_bad_rows=True" * found.has_bad_rows
    lines = [
        f"name={quoted(found.name)}",
        "rows=rows",
        "prompt=prompt",
        f"rewards={{{reward}: 1.0{', soft_xml: 0.2' if found.asks_for_tags else ''}}}",
        f"gold={_gold(found)}",
        f"solved={'None' if found.kind in NOTHING_RIGHT else solved}",
        f"data={found.data}",
        *([f"held_out={found.held_out}"] if found.held_out else []),
        f'config=Config(model="Qwen/Qwen2.5-1.5B-Instruct", base="nf4", steps=200{more})',
    ]
    return "task = Task(\n" + "".join(f"    {line},\n" for line in lines) + ")"


def _gold(found: Found) -> str:
    if found.kind == "none":
        return "None"
    if found.kind == "long":
        return '"{answer}"'
    if found.asks_for_tags:
        return '"<reasoning>\\nStep by step.\\n</reasoning>\\n<answer>\\n{answer}\\n</answer>\\n"'
    return '"<answer>{answer}</answer>"' if REWARDS[found.kind][0] == "correctness" else '"The answer is {answer}."'
