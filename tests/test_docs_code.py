"""Every block of code of the documents does what it shows: Python is run, command lines are those of our commands.

Documents with a block that trains, or that stands under the line `<!-- slow -->`, are run in the second stage: with a
run for RUN, a model for MODEL, and a hundredth of the steps.
Those of docs/rewards.md and docs/sandbox.md are run by test_docs_rewards.py.
"""

import doctest
import re
import shlex
from pathlib import Path

import pytest
import torch
from test_docs import DOCUMENTS, ROOT, text_of
from torch.distributed.run import get_args_parser

from grpo import command, new
from grpo.chat.__main__ import _parser as chat_line
from grpo.chat.__main__ import main as chat
from grpo.doctor.__main__ import JSON
from grpo.doctor.__main__ import main as doctor
from grpo.embedded import MODEL_DIR
from grpo.export.__main__ import _parse as parse_export
from grpo.export.__main__ import main as export
from grpo.ray import command_line as ray_line
from grpo.report.__main__ import command_line as report_line
from grpo.rewards.__main__ import _parse as parse_rewards
from grpo.run import main as run

# Documents that others' test files run.
ELSEWHERE = ("docs/rewards.md", "docs/sandbox.md")
BLOCK = re.compile(r"(?P<slow><!-- slow -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```", re.M | re.S)
# What a document assumes that its reader has.
GIVEN = {
    "kernels/README.md": lambda: {
        "hidden": torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True),
        "weight": torch.randn(11, 8, dtype=torch.bfloat16),
        "targets": torch.arange(5),
        "my_loss": lambda logprobs: -logprobs.mean(),
    }
}


def is_slow(block: re.Match) -> bool:
    return bool(block["slow"]) or "grpo.train(" in block["code"]


def made_short(code: str, run: Path) -> str:
    """A block about some run and model, of a small run and the tiny model."""
    code = re.sub(r"\bRUN\b|runs/gsm8k-\d+-\d+", str(run), code)
    small = "prompts_per_step=2, group_size=4, max_completion_tokens=32, eval_prompts=4"
    code = code.replace("MODEL", str(MODEL_DIR)).replace('grpo.train("gsm8k", ', f'grpo.train("gsm8k", {small}, ')
    return re.sub(r"\bsteps=(\d+)00\b", r"steps=\1", code)


def blocks(document: str, *languages: str) -> list[re.Match]:
    return [block for block in BLOCK.finditer(text_of(document)) if block["language"] in languages]


# ---- Python


def run_python(document: str, codes: list[str]) -> None:
    """The blocks of a document, one after the other, in a module of their own."""
    space = GIVEN.get(document, dict)() | {"__name__": "block"}
    for code in codes:
        if ">>>" in code:
            examples = doctest.DocTestParser().get_doctest(code, space, document, document, 0)
            examples.globs = space  # what one block defines the next one has
            assert doctest.DocTestRunner().run(examples, clear_globs=False).failed == 0
        else:
            exec(compile(code, document, "exec"), space)


WITH_PYTHON = [document for document in DOCUMENTS if document not in ELSEWHERE and blocks(document, "python")]
SLOW = [document for document in WITH_PYTHON if any(map(is_slow, blocks(document, "python")))]


@pytest.mark.parametrize("document", sorted(set(WITH_PYTHON) - set(SLOW)))
def test_python_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(document, [block["code"] for block in blocks(document, "python")])


@pytest.mark.slow
@pytest.mark.parametrize("document", SLOW)
def test_python_of_a_run_runs(document, toy_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(document, [made_short(block["code"], toy_run) for block in blocks(document, "python")])


# ---- command lines

COMMANDS = {
    "grpo.run": command.parse,
    "grpo.sft": command.parse,
    "grpo.dpo": command.parse,
    "grpo.chat": lambda words: chat_line().parse_args(words),
    "grpo.export": parse_export,
    "grpo.rewards": parse_rewards,
    "grpo.report": lambda words: report_line().parse_args(words),
    "grpo.new": lambda words: new.command_line().parse_args(words),
    "grpo.doctor": lambda words: command.parse([word for word in words if word != JSON]),
}
MAINS = {"grpo.run": run, "grpo.doctor": doctor, "grpo.chat": chat, "grpo.export": export}
LAUNCHERS = ("torchrun", "srun", "grpo.ray")
# Programs of others, whose command lines are their own.
OTHERS = {"pip", "pytest", "mkdocs", "ncu", "git", "source", "cd", "uvx", "vllm", "llama-cli", "ollama", "tensorboard"}


def commands_in(code: str) -> list[list[str]]:
    """The words of each command of a block: comments left out, `a && b` and `a; b` in two, lines that go on joined."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((place for place, word in enumerate(words) if word in ("&&", ";", "|")), len(words))
            found.append(words[:end])
            words = words[end + 1 :]
    return [words for words in found if words]


def check_command(words: list[str]) -> None:
    """A command of ours can be given so. Flags alone are looked up by test_docs.py."""
    if words[0].startswith("--"):
        return
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # a variable that it runs with
        words = words[1:]
    program, *rest = words[2:] if words[1:3] == ["-m", "grpo.ray"] else words
    if program == "grpo.ray":
        ray_line().parse_args(rest)
    if "torchrun" in words and "..." not in rest:  # srun may start it
        get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    if program in LAUNCHERS and "-m" in rest:  # of its own flags, then of what it starts
        program, rest = "python", rest[rest.index("-m") :]
    if program == "python" and rest[0] == "-m":
        if rest[1] in COMMANDS:
            COMMANDS[rest[1]](rest[2:])
        else:
            assert rest[1] in ("venv", "pip", "pytest", "build"), words
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), words
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", text_of("Makefile"), re.M), words
    elif program == "grpo":
        COMMANDS.get(f"grpo.{rest[0]}", command.parse)(rest[1:] if f"grpo.{rest[0]}" in COMMANDS else rest)
    else:
        assert program in OTHERS or (ROOT / program).is_file(), words


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if blocks(document, "bash", "sh", "shell")])
def test_command_lines_can_be_given(document):
    for block in blocks(document, "bash", "sh", "shell"):
        for words in commands_in(block["code"]):
            if "--help" not in words:
                check_command(words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_a_line_can_be_given(document):
    """`python -m grpo...` in the text, where it is whole."""
    for span in re.findall(r"`(python -m grpo\.[^`]+)`", text_of(document).replace("\n", " ")):
        for words in commands_in(span.replace(" ...", "")):
            if len(words) > 3:  # more than the command's name
                check_command(words)


def test_a_command_that_does_not_exist_is_found():
    for wrong in ("python -m grpo.run gsm8k --stepz 3", "python -m grpo.report", "python scripts/none.py", "make none"):
        with pytest.raises((Exception, SystemExit)):
            check_command(shlex.split(wrong))


@pytest.mark.slow
def test_the_quickstart_can_be_followed(tmp_path, monkeypatch):
    """Word for word, in an empty folder, as far as no GPU is needed; the run is made short. In this process:
    test_wheel.py has one for each command."""
    short = ["--steps", "2", "--prompts-per-step", "2", "--group-size", "4", "--eval-prompts", "4"]
    short += ["--max-completion-tokens", "32"]
    before_the_gpu = text_of("docs/quickstart.md").partition("## With a GPU")[0]
    given = [words for block in BLOCK.finditer(before_the_gpu) for words in commands_in(block["code"])]
    ours = [words[1:] for words in given if words[:2] == ["python", "-m"]]
    monkeypatch.chdir(tmp_path)
    for _, name, *rest in ours:
        more = short if "--run-dir" in rest else []
        assert MAINS[name]([*rest, *more]) == 0, shlex.join([name, *rest])
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "my-adapter", "my-model"}
    assert (tmp_path / "runs" / "first" / "report.html").exists()


# ---- names of others


def test_what_others_call_a_flag_is_told_as_the_command_line_tells_it():
    rows = [line for line in text_of("docs/coming-from.md").splitlines() if line.startswith("| `")]
    told = [(name.rpartition(".")[2], row) for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    known = [(name, row) for name, row in told if name in command.ALIASES]
    assert len(known) > 25
    for name, row in known:
        assert f"--{command.ALIASES[name].replace('_', '-')}" in row, row
