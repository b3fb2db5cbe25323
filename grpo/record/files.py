"""The files of a run that everything else can be made from again, an object of JSON a line. Knows no screen.

    metrics.jsonl      the numbers of each step and of each held-out score
    prompts.jsonl      each prompt once: text, messages, the row's fields, the gold answer
    completions.jsonl  every completion of a step: its prompt's id, text, what each reward paid, advantage, seed
    held_out.jsonl     every completion of a held-out score
    tokens.jsonl       of a few completions a step, each token: text, log p, gap to the sampler, entropy, weight

`id` of a prompt is the SHA-256 of what it asks and where it is from, so that a run whose data was changed on the way
keeps apart what was asked then and now.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, filterfalse
from pathlib import Path
from typing import Any

from grpo.record.jsonl import JsonLines, check_position, finite, read_lines, read_metrics
from grpo.record.sinks import Numbers, Recorded, Sink, TokenRecords
from grpo.types import Group, Prompt

FILES = ("metrics.jsonl", "prompts.jsonl", "completions.jsonl", "held_out.jsonl", "tokens.jsonl")
TRAIN, HELD_OUT = "train", "held-out"
LONGEST_REPR = 200  # of a field that JSON has no word for

Gold = Callable[[Prompt], str | None]


def no_gold(prompt: Prompt) -> None:
    """Of a task that knows no gold answers."""


class Files(Sink):
    """Opens or makes the files in `folder`, at the positions that a checkpoint has of them.

    position: what `position()` was when the checkpoint was saved that the run goes on from: what was written later is
    dropped, so that a resumed run leaves the files of an uninterrupted one. None: new files.
    """

    def __init__(self, folder: Path, position: Mapping[str, int] | None = None, gold: Gold = no_gold):
        # A file that the checkpoint does not know of is of a later version than it: of it nothing stays.
        at = {name: position.get(name, 0) if position is not None else None for name in FILES}
        paths = {name: folder / name for name in FILES}
        for name, path in paths.items():
            check_position(path, at[name])
        # Read before anything is cut: a damaged file stays as it is.
        self.recorded: list[Recorded] = []
        self._known: set[str] = set()  # ids of the prompts that are written down
        if position is not None:
            self.recorded += _existing(paths["metrics.jsonl"], at["metrics.jsonl"], read_metrics)
            self._known |= {
                str(r.get("id")) for r in _existing(paths["prompts.jsonl"], at["prompts.jsonl"], read_lines)
            }
        self._files = {name: JsonLines(path, at[name]) for name, path in paths.items()}
        self._gold = gold

    @property
    def metrics_path(self) -> Path:
        return self._files["metrics.jsonl"].path

    def step(self, step: int, metrics: Numbers) -> None:
        self._write("metrics.jsonl", [{"step": step, **finite(metrics)}])

    def evaluation(self, step: int, scores: Numbers, groups: Sequence[Group] = ()) -> None:
        self._prompts(HELD_OUT, groups)
        self._write("held_out.jsonl", completion_records(step, HELD_OUT, groups, {"reward": "rewards"}))
        self._write("metrics.jsonl", [{"step": step, **finite(scores)}])

    def completions(self, step: int, groups: Sequence[Group], tokens: TokenRecords) -> None:
        self._prompts(TRAIN, groups)
        earned = {"reward": "rewards", "advantage": "advantages"}
        self._write("completions.jsonl", completion_records(step, TRAIN, groups, earned))
        self._write("tokens.jsonl", [{"step": step, **record} for record in tokens])

    def position(self) -> dict[str, int]:
        """How far the files are written, in bytes: for the checkpoint, which waits for `fsync`."""
        return {name: file.position() for name, file in self._files.items()}

    def fsync(self) -> None:
        """When this returns, all that was written to these files is on the disk."""
        for file in self._files.values():
            file.fsync()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _prompts(self, split: str, groups: Sequence[Group]) -> None:
        """Those that are not written down yet."""
        asked = {prompt_id(split, group.prompt): group.prompt for group in groups}
        new = list(filterfalse(self._known.__contains__, asked))
        self._write("prompts.jsonl", [prompt_record(id, split, asked[id], self._gold) for id in new])
        self._known.update(new)

    def _write(self, name: str, records: list[dict[str, Any]]) -> None:
        self._files[name].write(records)


def _existing(path: Path, end: int | None, read: Callable) -> list[Any]:
    return list(read(path, end)) if path.exists() else []


def prompt_id(split: str, prompt: Prompt) -> str:
    """What the records know a prompt by."""
    return hashlib.sha256(f"{split} {prompt.index} {prompt.text}".encode(errors="replace")).hexdigest()[:16]


def prompt_record(id: str, split: str, prompt: Prompt, gold: Gold) -> dict[str, Any]:
    """A line of prompts.jsonl. Of a row's field that JSON has no word for stands what Python calls it."""
    record = {"id": id, "split": split, "prompt": prompt.index, "text": prompt.text}
    try:
        row = {"messages": prompt.messages, "fields": prompt.fields, "gold": gold(prompt)}
        return record | json.loads(json.dumps(row, default=_in_words, skipkeys=True), parse_constant=_no_number)
    except Exception as error:  # in a circle, a number of 5000 digits, a field that cannot be shown: no reason to stop
        return record | {"messages": None, "fields": {"not written": type(error).__name__}, "gold": None}


def _in_words(value: object) -> str:
    return f"{type(value).__name__} {value!r:.{LONGEST_REPR}}"


def _no_number(name: str) -> None:
    """NaN and infinities, which JSON cannot say."""


def completion_records(
    step: int, split: str, groups: Sequence[Group], earned: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A line each of completions.jsonl or held_out.jsonl. earned: name in the line -> the field of Group."""
    numbered = enumerate(groups)
    return list(chain.from_iterable(_of_group(step, split, number, group, earned) for number, group in numbered))


def _of_group(step: int, split: str, number: int, group: Group, earned: Mapping[str, str]) -> list[dict[str, Any]]:
    parts = {name: values.tolist() for name, values in group.parts.items()}
    columns = {name: getattr(group, field).tolist() for name, field in earned.items()}
    told = _told_of(group)
    id = prompt_id(split, group.prompt)
    return [
        {
            "step": step,
            "group": number,
            "member": member,
            "prompt": group.prompt.index,
            "id": id,
            "text": completion.text,
            "finish": completion.finish,
            "tokens": len(completion.tokens),
            "parts": finite({name: values[member] for name, values in parts.items()}),
            **finite({name: values[member] for name, values in columns.items()}),
            **told[member],
            "policy_version": completion.policy_version,
            "seed": completion.seed,
        }
        for member, completion in enumerate(group.completions)
    ]


def _told_of(group: Group) -> list[dict[str, dict[str, Any]]]:
    """Of each completion why rewards failed on it, and what they told `log_extra`, where there is something."""
    told: list[dict[str, dict[str, Any]]] = [{} for _ in group.completions]
    for kind, columns in (("failed", group.failed), ("extra", group.extra)):
        for name, values in columns.items():
            for member, value in values.items():
                told[member].setdefault(kind, {})[name] = value
    return told
