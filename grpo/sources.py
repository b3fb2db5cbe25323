"""Sources: what --data names, here or on the hub, and which of its splits is meant. Knows nothing of tasks.

Source                       what --data says, with what --columns, --splits and --skip-bad-rows say of it
local_path(data)             the file or folder that is meant, and the configuration of its data; None for the hub's
find_splits(data, name)      name of each split -> how its rows are read

What lies here comes before what the hub has under the same name, as in `datasets` itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from grpo.errors import UserError, in_words, nearest
from grpo.files import FORMATS, Bad, Indexed, Row, format_of, read_file

Read = Callable[[Bad | None], Any]  # the rows of a split, by their index

# What data sets call the split to train on, and the one to ask held-out prompts from; the first that is there.
WORDS = {"train": ("train",), "test": ("test", "validation", "valid", "val", "dev", "eval")}
HOLD_OUT = "Where there is no test split, --held-out 100 keeps so many training prompts for it (a Task: held_out=100)."


@dataclass
class Reading:
    """How the rows of a data set are read, and what was found on the way."""

    columns: Mapping[str, str] = field(default_factory=dict)  # the task's name -> that of the data
    splits: Mapping[str, str] = field(default_factory=dict)  # "train" or "test" -> the name of the data's split
    skip_bad_rows: bool = False
    bad: list[str] = field(default_factory=list)  # rows that were left out, a sentence each
    notes: dict[str, None] = field(default_factory=dict)  # what the user should know of it, in order
    rows: Any = None  # what `read_rows` gave last; None where the task reads its rows in some other way
    place: int | None = None  # the only one of them that it gives now


class Source(str):
    """What --data says, and how its rows are read."""

    reading: Reading

    def __new__(cls, data: str, reading: Reading | None = None) -> Source:
        source = super().__new__(cls, data)
        source.reading = reading or Reading()
        return source


def local_path(data: str) -> tuple[Path, str] | None:
    """The file or folder, and the configuration behind a colon; None where it is a name of the hub's.

    Raises:
        UserError: it is a path, and nothing is there.
    """
    whole, (before, _, configuration) = Path(data).expanduser(), data.rpartition(":")
    if whole.exists():
        return whole, ""
    part = Path(before).expanduser()
    if before and part.exists():
        return part, configuration
    if whole.is_symlink():
        raise UserError(f"{data} is a link to {os.readlink(whole)}, and nothing is there. Mend the link.")
    if looks_like_a_path(data):
        beside = (
            sorted(path.name for path in whole.parent.glob("*") if format_of(path)) if whole.parent.is_dir() else []
        )
        raise UserError(
            f"There is no file or folder {data}.{nearest(whole.name, beside)} --data takes a file of rows "
            f"({', '.join(FORMATS)}), a folder with such files, such as train.jsonl and test.jsonl, or the name of a "
            "data set of the hub."
        )
    return None


def is_local(data: str) -> bool:
    """Whether it is here, or a path where nothing is; the error is told where it is read."""
    try:
        return local_path(data) is not None
    except UserError:
        return True


def whole_path(data: str) -> str:
    """The same by the whole path where it lies here, so that a run goes on from any other folder too."""
    try:
        found = None if data == "embedded" or "\0" in data else local_path(data)
    except UserError:
        return data
    if found is None:
        return data
    path, configuration = found
    return f"{path.resolve()}{f':{configuration}' if configuration else ''}"


def looks_like_a_path(data: str) -> bool:
    """Whether it can be no name of the hub's."""
    known = bool(format_of(Path(data))) or data.count("/") > 1
    return data.startswith((".", "/", "~")) or known or bool(Path(data).suffix and "/" not in data)


def hub_name(data: str) -> tuple[str, str]:
    """The name of a data set of the hub's, and the configuration behind a colon."""
    name, _, configuration = data.partition(":")
    return name, configuration


def find_splits(data: str, name: str, notes: dict[str, None], hub_arguments: Mapping[str, Any]) -> dict[str, Read]:
    """The splits of a data set, by their names; of a single file one, "train".

    name  of the configuration where `data` says none, and the data has one of that name

    Raises:
        UserError: there is no such data set, or nothing in it can be read.
    """
    found = local_path(data)
    if found is None:
        return _of_hub(data, name, hub_arguments)
    path, configuration = found
    if path.is_file():
        return {"train": partial(read_file, path)}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_to_disk(path)
    return _of_folder(path.resolve(), configuration, name, notes)


def choose_split(splits: Mapping[str, Any], wanted: str, source: str, reading: Reading) -> str:
    """The name of the split that is meant by "train" or "test".

    Raises:
        UserError: there is none, or nobody knows which.
    """
    there = ", ".join(splits)
    if named := reading.splits.get(wanted):
        if named not in splits:
            raise UserError(f"--splits {wanted}={named}, but {source} has {there}.{nearest(named, splits)}")
        return named
    if len(splits) == 1 and wanted == "train":
        if any(there.lower().startswith(word) for word in WORDS["test"]):
            reading.notes[f"{source} has only one split, {there}: it is what is trained on."] = None
        return there
    if len(splits) == 1 and wanted == "test" != there:
        raise UserError(f"{source} has only one split, {there}, and none to ask held-out prompts from. {HOLD_OUT}")
    for word in (wanted, *WORDS.get(wanted, ())):
        names = [name for name in splits if name.lower() == word] or [n for n in splits if n.lower().startswith(word)]
        if len(names) > 1:  # such as train_sft beside train_gen
            raise UserError(f"{source} has {there}. Which is meant by {wanted}? Say --splits {wanted}={names[0]}")
        if names:
            return names[0]
    raise UserError(
        f"{source} has {there}, and nobody says which is meant by {wanted}. Say --splits {wanted}={next(iter(splits))}"
        f"{f'. {HOLD_OUT}' if wanted == 'test' else ''}"
    )


# ---- folders


def _saved_to_disk(path: Path) -> dict[str, Read]:
    """What `save_to_disk` of the `datasets` library writes."""
    import datasets

    try:
        held = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow's and the library's own have no class in common
        raise UserError(f"{path} cannot be read as a folder of `save_to_disk`: {in_words(error)}.") from error
    splits = held if isinstance(held, dict) else {str(held.split or "train"): held}
    return {str(name): partial(_as_it_is, rows) for name, rows in splits.items()}


def _as_it_is(rows: Any, bad: Bad | None) -> Any:
    return rows


def _of_folder(path: Path, configuration: str, name: str, notes: dict[str, None]) -> dict[str, Read]:
    """The files of a folder by split, as `datasets` finds them: in README.md, by the names of files or of folders."""
    import datasets

    _check_links(path)
    try:
        names = datasets.get_dataset_config_names(str(path))
        chosen = _configuration(path, names, configuration, name)
        builder: Any = datasets.load_dataset_builder(str(path), name=chosen)
        files = builder.config.data_files or {}
    except UserError:
        raise
    except Exception as error:  # the library's own classes, fsspec's, YAML's
        if files := _by_their_names(path):  # of several kinds, which the library takes for a mistake
            return {split: partial(_read_files, of_split) for split, of_split in files.items()}
        held = sorted(each.name for each in path.iterdir())
        inside = f"It holds {', '.join(held[:6])}{', ...' * (len(held) > 6)}." if held else "It is empty."
        raise UserError(
            f"No data is found in the folder {path}. {inside} A data folder holds train.jsonl and test.jsonl, or such "
            f"files as {', '.join(FORMATS)} ({(str(error).strip().splitlines() or [type(error).__name__])[0]})."
        ) from error
    splits = {str(split): [Path(file) for file in of_split] for split, of_split in files.items()}
    read = {file for of_split in splits.values() for file in of_split}
    beside = sorted(each.name for each in path.iterdir() if format_of(each) and each not in read)
    if beside and not any(each.is_dir() for each in path.iterdir()):
        unread = f"{', '.join(beside[:4])}{', ...' * (len(beside) > 4)}"
        notes[f"In {path} nothing reads {unread}: its splits are {', '.join(splits)}, by the names of the files."] = (
            None
        )
    return {split: partial(_read_files, of_split) for split, of_split in splits.items()}


def _check_links(path: Path) -> None:
    """Raises UserError where a link leads nowhere: what it should have been might be taken from another split."""
    for file in path.rglob("*"):
        if file.is_symlink() and format_of(file) and not file.exists():
            raise UserError(f"{file} is a link to {os.readlink(file)}, and nothing is there. Mend the link.")


def _by_their_names(path: Path) -> dict[str, list[Path]]:
    """Files beside each other that are called after splits: train.jsonl and test.csv."""
    files = [file for file in sorted(path.iterdir()) if format_of(file)]
    named = {file.name.partition(".")[0].lower(): [file] for file in files}
    return {split: of_split for split, of_split in named.items() if any(split in words for words in WORDS.values())}


def _configuration(path: Path, names: list[str], asked: str, usual: str) -> str | None:
    """Which configuration of a folder is read: what --data says, what the task says, or the only one."""
    if asked and asked not in names:
        raise UserError(f"The data in {path} has no configuration {asked!r}, but {', '.join(names)}.")
    if asked or usual in names:
        return asked or usual
    if len(names) > 1 and "default" not in names:
        raise UserError(
            f"The data in {path} has several configurations: {', '.join(names)}. Say which behind a colon: "
            f"--data {path}:{names[0]}"
        )
    return None


def _read_files(files: Sequence[Path], bad: Bad | None) -> Any:
    parts = [read_file(file, bad) for file in files]
    return parts[0] if len(parts) == 1 else Joined(parts)


class Joined(Indexed[Row]):
    """The rows of several files, one file after the other."""

    def __init__(self, parts: Sequence[Any]):
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def at(self, index: int) -> Row:
        """The row there."""
        index = range(len(self))[index]
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)

    def __iter__(self) -> Any:
        for part in self.parts:
            yield from part


# ---- the hub


def _of_hub(data: str, usual: str, arguments: Mapping[str, Any]) -> dict[str, Read]:
    import datasets

    name, configuration = hub_name(data)
    try:
        try:
            held = datasets.load_dataset(name, configuration or usual or None, **arguments)
        except ValueError as error:
            if configuration or not usual or "BuilderConfig" not in str(error):
                raise
            held = datasets.load_dataset(name, **arguments)  # another one than the task is written for
    except Exception as error:  # the hub's client raises a dozen unrelated classes when it is offline
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"The data set {data} is neither a file or folder here nor to be had from the hub: {reason} Check the name "
            f"(NAME, or NAME:CONFIGURATION) and the network, or pass --data FOLDER with train.jsonl and test.jsonl."
        ) from error
    splits = held if isinstance(held, dict) else {"train": held}
    return {str(split): partial(_as_it_is, rows) for split, rows in splits.items()}
