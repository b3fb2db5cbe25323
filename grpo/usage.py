"""Usage: the README.md that lies beside what was trained, with the commands that use it. Knows nothing of tensors.

What it names (a task, a model, a folder) may be anybody's: it stands there as text and as words of a command, never as
Markdown, HTML, a shell's or Python's syntax.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence

README = "README.md"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that its --max-lora-rank takes, so far


def readme(title: str, about: str, python: Sequence[str], commands: Sequence[str]) -> str:
    """The page: a title, a sentence, a program and commands, of which the lines are as they should be."""
    program = [*_fenced("python", python)] if python else []
    return "\n".join([f"# {escaped(title)}", "", escaped(about), "", *program, *_fenced("bash", commands)]) + "\n"


def usage_of_adapter(
    title: str, base: str, here: str, rank: int, in_a_run: bool = False, on_the_hub: bool = False
) -> str:
    """The README.md of an adapter in the folder `here`. in_a_run: it is a run's checkpoint. on_the_hub: `here` is a
    name there."""
    python = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({quoted(base)}), {quoted(here)})",
        f"tokenizer = AutoTokenizer.from_pretrained({quoted(here)})",
    ]
    most = next((each for each in VLLM_RANKS if each >= rank), rank)
    commands = [
        f"vllm serve {word(base)} --enable-lora --max-lora-rank {most} --lora-modules {word(f'trained={here}')}",
    ]
    if on_the_hub:
        commands += [f"python -m grpo.run TASK.py --model {word(base)} --adapter {word(here)}"]
    else:
        commands += [
            f"python -m grpo.chat {word(here)}",
            *([f"python -m grpo.run --eval {word(here)}"] if in_a_run else []),
            f"python -m grpo.export {word(here)} --to merged-model --merged",
            f"python -m grpo.export {word(here)} --to gguf-adapter --gguf",
        ]
    return readme(title, f"A LoRA adapter of rank {rank} over {one_line(base)}, in PEFT's format.", python, commands)


def usage_of_model(title: str, base: str, here: str, has_gguf: bool) -> str:
    """The README.md of a merged model."""
    python = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"model = AutoModelForCausalLM.from_pretrained({quoted(here)})",
        f"tokenizer = AutoTokenizer.from_pretrained({quoted(here)})",
    ]
    gguf = [f"llama-cli -m {word(f'{here}/model.gguf')}", f"ollama create my-model -f {word(f'{here}/Modelfile')}"]
    commands = [f"vllm serve {word(here)}", *(gguf if has_gguf else [])]
    return readme(title, f"{one_line(base)} with a LoRA adapter merged into it.", python, commands)


def usage_of_gguf(title: str, base: str, here: str) -> str:
    """The README.md of an adapter as a GGUF."""
    commands = [
        f"llama-cli -m base.gguf --lora {word(f'{here}/adapter.gguf')}",
        f"ollama create my-model -f {word(f'{here}/Modelfile')}",
    ]
    about = f"A LoRA adapter for llama.cpp. base.gguf is {one_line(base)} as a GGUF, which Ollama wants in this folder."
    return readme(title, about, [], commands)


def escaped(text: str) -> str:
    """Text in Markdown, in which nothing is a mark."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$@:-])", r"\\\1", one_line(text))


def word(text: str) -> str:
    """One word of a shell's command line."""
    return shlex.quote(one_line(text))


def quoted(text: str) -> str:
    """A string of Python's."""
    return json.dumps(one_line(text))


def one_line(text: str) -> str:
    """Text without new lines, and without what cannot be seen or turns the direction of writing."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _fenced(language: str, lines: Sequence[str]) -> list[str]:
    # No line begins with what a name says, so none of them ends the block.
    return [f"```{language}", *lines, "```", ""]
