"""Companions: what a model's tokenizer and its generation are made of, as files. Knows nothing of adapters or runs.

They are copied as they are: a tokenizer that is saved by one version of transformers may not open in another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from transformers.utils.hub import cached_file

# Of a tokenizer in any of its forms (tokenizers, sentencepiece, byte pairs, mistral-common), and its chat template.
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tekken.json", "chat_template.jinja", "chat_template.json"),
)
GENERATION = "generation_config.json"


def companions(source: str, ask: bool = False) -> dict[str, Path]:
    """File name -> where it is, of those that come with a model. source: its folder, or its name on the hub.

    ask: the hub, for what was never fetched; else only what is on this machine is found.
    """
    return {name: path for name in (*TOKENIZER, GENERATION) if (path := file_of(source, name, ask))}


def file_of(source: str, name: str, ask: bool = False) -> Path | None:
    """Where a file of a model is; None where there is none to be had."""
    return _here(source, name) or (_found(source, name, local_files_only=False) if ask else None)


def contents(files: dict[str, Path]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file that can be read."""
    for name, path in files.items():
        with suppress(OSError):
            yield name, path.read_bytes()


@cache
def _here(source: str, name: str) -> Path | None:
    return _found(source, name, local_files_only=True)


def _found(source: str, name: str, local_files_only: bool) -> Path | None:
    quiet = ("gated_repo", "missing_entries", "connection_errors")
    optional = {f"_raise_exceptions_for_{what}": False for what in quiet}
    try:
        found = cached_file(source, name, local_files_only=local_files_only, **optional)
    except Exception:  # the hub's client raises classes of its own; a companion is never worth an end
        return None
    return Path(found) if found else None
