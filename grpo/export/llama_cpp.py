"""The merged model as a GGUF, by the converter of the user's own llama.cpp. Knows nothing of what is in a GGUF."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from grpo.errors import UserError
from grpo.export.lora_gguf import write_modelfile
from grpo.export.source import Source

CONVERTER = "convert_hf_to_gguf.py"
MODEL_FILE = "model.gguf"
OUTPUT_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
SHOWN = 3  # lines of what a converter that failed said last


def converter_in(path: str) -> Path:
    """The converter of a checkout of llama.cpp.

    Raises:
        UserError: there is none.
    """
    given = Path(path).expanduser()
    script = given if given.name == CONVERTER else given / CONVERTER
    if not script.is_file():
        raise UserError(
            f"--llama-cpp is {path}, where there is no {CONVERTER}. Give the folder of a checkout of llama.cpp, with "
            "the packages of its requirements.txt installed here."
        )
    return script.resolve()


def convert(script: Path, source: Source, folder: Path, dtype: str) -> list[str]:
    """Write model.gguf and a Modelfile beside the merged model in `folder`; returns what is to be told.

    Raises:
        UserError: the converter failed, or wrote nothing.
    """
    out = folder / MODEL_FILE
    command = [sys.executable, str(script), str(folder), "--outfile", str(out), "--outtype", OUTPUT_TYPES[dtype]]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode or not out.is_file():
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()][-SHOWN:]
        raise UserError(
            f"llama.cpp's {script} ended with code {done.returncode}: {' / '.join(said) or 'it said nothing'}. "
            "Install the packages of its requirements.txt here, or leave --gguf out and convert the merged model there."
        )
    write_modelfile(folder, MODEL_FILE, source)
    return [f"{MODEL_FILE} is the merged model, by {script}"]
