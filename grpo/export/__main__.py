"""The command `python -m grpo.export RUN --to DIR`: what a run has learned, in the format that other programs read.

    python -m grpo.export runs/gsm8k-20260101-120000 --to my-adapter            PEFT's adapter, of the best checkpoint
    python -m grpo.export runs/gsm8k-20260101-120000 --to my-model --merged     one model of 16 bits
    python -m grpo.export runs/gsm8k-20260101-120000 --to my-gguf --gguf        the adapter for llama.cpp and Ollama
    python -m grpo.export runs/gsm8k-20260101-120000 --to my-adapter --push me/my-adapter           onto the hub too

Exit codes: 0 done; 2 bad input, or memory or a disk that ran out, told in a sentence; 130, 143 or 129 stopped by
Ctrl-C, SIGTERM or SIGHUP. But for the first, nothing is left of the export.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from grpo.errors import Stopped, UserError, is_out_of_memory, nearest
from grpo.guards import stopped_by_signals
from grpo.terminal import plain, plain_logs, say, working
from grpo.usage import README, usage_of_adapter, usage_of_gguf, usage_of_model

if TYPE_CHECKING:
    from grpo.export.push import Hub
    from grpo.export.source import Source

PROGRAM = "python -m grpo.export"


@dataclass(frozen=True)
class Options:
    """Write what a run has learned into a new folder: the adapter in PEFT's format, or a whole model."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = ""
    """A run's folder, one checkpoint, or the folder of an adapter that PEFT wrote."""
    to: str = ""
    """The folder to write into. One that has something in it is refused."""
    checkpoint: str = "best"
    """Of a run's checkpoints: best (by its held-out score), last, or the number of a step."""
    model: str | None = None
    """The base model, where it is elsewhere than the run or the adapter says: a folder, or a name of the hub."""
    merged: tyro.conf.FlagCreatePairsOff[bool] = False
    """Add the adapter to its base, and write the whole model."""
    onto: Literal["trained", "original"] = "trained"
    """What --merged adds to: the weights that were trained over, which are the dequantised ones if those were NF4, or
    those of the checkpoint that the base was made from."""
    dtype: Literal["auto", "bf16", "float16", "float32"] = "auto"
    """Of the merged weights. auto: that of the base's checkpoint if it is of 16 bits, else bf16."""
    gguf: tyro.conf.FlagCreatePairsOff[bool] = False
    """The adapter as a GGUF file, which llama.cpp and Ollama put over a GGUF of the base, and a Modelfile. With
    --merged the whole model."""
    llama_cpp: str | None = None
    """For --merged --gguf: a checkout of llama.cpp, whose convert_hf_to_gguf.py is run."""
    push: str | None = None
    """OWNER/NAME on the hub, where the folder is uploaded to, with a card of the run's numbers. Private."""
    public: tyro.conf.FlagCreatePairsOff[bool] = False
    """For --push: everybody may have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own. Returns the exit code."""
    try:
        with stopped_by_signals():
            if argv is None:
                plain_logs()
            export(_parse(list(sys.argv[1:] if argv is None else argv)))
            return 0
    except UserError as error:
        told = str(error)
    except OSError as error:
        file = error.filename2 or error.filename
        told = f"{file}: {error.strerror or error}." if file else f"The export could not be written ({error})."
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        told = "This machine's memory does not hold the export. Close other programs, or export the adapter alone."
    except KeyboardInterrupt as error:
        print("Stopped; nothing is left of the export.", file=sys.stderr)
        return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)
    print(f"error: {plain(told)}", file=sys.stderr)
    return 2


def _parse(argv: list[str]) -> Options:
    """The options.

    Raises:
        UserError: a flag that does not exist, or one that is missing.
        SystemExit: after help; and code 2 after a value that cannot be read.
    """
    try:
        with redirect_stderr(StringIO()):
            options, unknown = tyro.cli(
                Options, args=argv, prog=PROGRAM, return_unknown_args=True, config=(tyro.conf.DisallowNone,)
            )
    except SystemExit:
        tyro.cli(Options, args=argv, prog=PROGRAM, config=(tyro.conf.DisallowNone,))
        raise
    if unknown:
        known = [f"--{name.replace('_', '-')}" for name in Options.__dataclass_fields__ if name != "run"]
        raise UserError(f"There is no use for {unknown[0]}.{nearest(unknown[0], known)} --help lists the flags.")
    if not (options.run and options.to):
        raise UserError(f"Say what to export and where to: {PROGRAM} RUN --to DIR.")
    _check_combination(options)
    return options


def _check_combination(options: Options) -> None:
    if options.public and options.push is None:
        raise UserError("--public is of --push: it says who may see what is pushed. Give --push OWNER/NAME too.")
    if not options.merged and (options.onto, options.dtype) != ("trained", "auto"):
        raise UserError("--onto and --dtype are of --merged: an adapter is exported as it is. Give --merged too.")
    if options.llama_cpp is not None and not (options.merged and options.gguf):
        raise UserError("--llama-cpp is for the whole model as a GGUF. Give --merged and --gguf too.")
    if options.merged and options.gguf and options.llama_cpp is None:
        raise UserError(
            "A whole model becomes a GGUF by llama.cpp's own converter: give --llama-cpp PATH, a checkout of it. "
            "Without --merged the adapter alone is written, which needs none."
        )


def export(options: Options) -> None:
    """Do what the options say.

    Raises:
        UserError: what is asked for cannot be had, or the folder is not free.
    """
    from grpo.export.folder import check_free, new_folder
    from grpo.export.source import find

    to = Path(options.to)
    check_free(to)
    write = _writer(options)
    source = find(options.run, options.checkpoint, options.model)
    hub = _hub(options)
    with new_folder(to) as folder:
        told = write(source, folder)
        readme = _readme(options, source, options.to, source.base) if hub is None else _card(options, source, folder)
        (folder / README).write_text(readme, encoding="utf-8")
    for line in told:
        say(line)
    say(f"written to {to}")
    if hub:
        with working("upload"):
            where = hub.push(to, f"{source.title}, by grpo.export")
        say(f"pushed to {where} ({'public' if hub.is_public else 'private'})")


def _readme(options: Options, source: Source, to: str, base: str) -> str:
    if options.merged:
        return usage_of_model(source.title, base, to, options.gguf)
    if options.gguf:
        return usage_of_gguf(source.title, base, to)
    return usage_of_adapter(source.title, base, to, source.rank, on_the_hub=options.push is not None)


def _hub(options: Options) -> Hub | None:
    """The repository that is asked for, if there is one that can be pushed to.

    Raises:
        UserError: it cannot.
    """
    if options.push is None:
        return None
    from grpo.export.push import Hub

    hub = Hub(options.push, options.public)
    hub.check()
    return hub


def _card(options: Options, source: Source, folder: Path) -> str:
    """The README of what is pushed. The adapter in `folder` then names its base as others may find it."""
    from grpo.export.card import card, public_name
    from grpo.policy.adapter import SETTINGS

    assert options.push
    base = public_name(source.base)
    if (settings := folder / SETTINGS).is_file():
        described = json.loads(settings.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
        settings.write_text(json.dumps(described, indent=2), encoding="utf-8")
    if base != source.base:
        say(f"note: others do not have {source.base}: the card calls it {base}. --model OWNER/NAME says where it is.")
    library = "transformers" if options.merged else "gguf" if options.gguf else "peft"
    return card(_readme(options, source, options.push, base), source, library)


def _writer(options: Options) -> Callable[[Source, Path], list[str]]:
    """What writes what is asked for.

    Raises:
        UserError: something that it needs is not here.
    """
    if options.merged:
        from grpo.export.llama_cpp import converter_in

        return partial(_merge, options, converter_in(options.llama_cpp) if options.llama_cpp is not None else None)
    if options.gguf:
        from grpo.export.lora_gguf import check_installed, write_lora_gguf

        check_installed()
        return write_lora_gguf
    from grpo.export.adapter import write_adapter

    return write_adapter


def _merge(options: Options, converter: Path | None, source: Source, folder: Path) -> list[str]:
    from grpo.export.adapter import copy_companions
    from grpo.export.llama_cpp import convert
    from grpo.export.merged import write_merged

    with working("merging") as progressed:
        dtype, told = write_merged(source, folder, options.onto, options.dtype, progressed)
    told += copy_companions(source, folder)
    if converter:
        with working("llama.cpp's converter"):
            told += convert(converter, source, folder, dtype)
    return told


if __name__ == "__main__":
    sys.exit(main())
