"""What the documents name is there: the task file in the README, tables, flags, links, paths, names, LOG's titles."""

import dataclasses
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import grpo_kernels
import pytest

import grpo
from grpo.chat.__main__ import _parser as chat_parser
from grpo.config import field_names
from grpo.export.__main__ import Options as ExportOptions
from grpo.rewards.__main__ import Options as RewardOptions
from grpo.run import main
from grpo.task import Task

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "tasks/README.md",
    "examples/reward_plugin/README.md",
    "kernels/README.md",
    "benchmarks/README.md",
]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))

# Flags of programs that are not in this repository, where the documents use them.
OTHER_PROGRAMS = {"--out", "--backend-store-uri", "--no-deps", "--target", "--clock-control", "--set", "--durations"}

OWN_FLAGS = {"--json"}  # of the commands beside python -m grpo.run
OWN_FLAGS |= set(chat_parser()._option_string_actions)
OTHER_PROGRAMS |= {"--enable-lora", "--max-lora-rank", "--lora-modules", "--lora"}  # vLLM's, llama.cpp's
OTHER_PROGRAMS |= {
    *("--host", "--port", "--dtype", "--max-model-len", "--max-loras", "--logprobs-mode", "--generation-config"),
    *("--tensor-parallel-size", "--data-parallel-size", "--api-key", "--no-enable-chunked-prefill"),
    "--gpu-memory-utilization",
}  # vLLM's server's
OTHER_PROGRAMS |= {
    *("--nproc-per-node", "--nnodes", "--standalone", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--rdzv-conf"),
    *("--max-restarts", "--shutdown-timeout", "--requeue"),
    *("--workers", "--gpu", "--cpus"),
    *("--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--signal"),
}  # torchrun's and Slurm's
# Of python -m grpo.export.
EXPORT_FLAGS = {f"--{name.replace('_', '-')}" for name in ExportOptions.__dataclass_fields__}
REWARD_FLAGS = {f"--{name}" for name in RewardOptions.__dataclass_fields__}  # of python -m grpo.rewards

TOPS = ("examples", "grpo", "kernels", "tasks", "docs", "tests", "scripts", "benchmarks")
MODULES = {module.name for module in pkgutil.iter_modules(grpo.__path__)}

SUBJECTS = ["Kernels", "Rollout", "Policy", "Learning", "Engineering"]
VERDICTS = re.compile(r"\b(works|kept|measured|mended|negative|missed|failed|failure)\b")
LONGEST_TITLE = 70


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def text_with_siblings(program: str) -> str:
    """A program's text, and that of the files beside it that it imports, which may have flags of it."""
    imported = re.findall(r"^(?:import|from) (\w+)", text_of(program), re.M)
    files = [Path(program).with_name(f"{name}.py") for name in imported]
    return "\n".join(map(text_of, [program, *(str(file) for file in files if (ROOT / file).exists())]))


def spans_of(document: str) -> list[str]:
    """What is set as code: every `...`, and every line between ``` and ```."""
    text = text_of(document)
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S)
    return re.findall(r"`([^`\n]+)`", text) + [line for block in blocks for line in block.splitlines()]


def names_of_others(document: str) -> set[str]:
    """What stands as code in the first column of tables under <!-- names -->."""
    tables = re.findall(r"<!-- names -->\n+(.*?)(?:\n\n|\Z)", text_of(document), re.S)
    cells = [line.split("|")[1] for table in tables for line in table.splitlines()]
    return set(re.findall(r"`([^`]+)`", " ".join(cells)))


def test_the_readme_shows_the_task_file_as_it_is():
    assert text_of("tasks/gsm8k.py") in text_of("README.md")


def test_the_task_in_the_guide_passes_its_check(tmp_path, capsys):
    task = tmp_path / "capitals.py"
    task.write_text(re.search(r"```python\n(.*?)```", text_of("docs/tasks.md"), re.S)[1])
    assert main([str(task), "--check", "--model", "embedded"]) == 0
    assert "full marks" in capsys.readouterr().out


def test_the_guide_tells_every_field_of_a_task():
    told = set(re.findall(r"^\| `(\w+)[`(]", text_of("docs/tasks.md"), re.M))
    assert {field.name for field in dataclasses.fields(Task)} <= told


@pytest.mark.parametrize(
    "script",
    [f"write_{name}_table.py" for name in ("readme", "kernel", "metrics", "recipe")]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("make_reports.py", "write_scaling_table.py")],
)
def test_tables_are_those_of_the_results(script):
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """What --help lists."""
    command = [sys.executable, "-m", "grpo.run", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}).stdout
    listed = " ".join(re.findall(r"│ (-.*?)(?:  |│)", printed))
    return set(re.findall(r"--[a-z][a-z0-9-]*", listed))


def test_every_field_of_the_configuration_is_a_flag(flags):
    assert {f"--{name.replace('_', '-')}" for name in field_names()} <= flags


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_in_the_documents_exist(document, flags):
    for span in spans_of(document):
        program = re.search(r"python ((?:scripts|benchmarks|tests)/[\w/]+\.py)", span)
        own = set(re.findall(r"\"(--[a-z][a-z0-9-]*)\"", text_with_siblings(program[1]))) if program else set()
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", span))
        unknown = used - (own if program else flags | OTHER_PROGRAMS | REWARD_FLAGS | EXPORT_FLAGS | OWN_FLAGS)
        assert not unknown, f"{document}: no such flag in `{span}`: {unknown}"


@pytest.mark.parametrize("document", [*DOCUMENTS, "LOG.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(document):
    path = ROOT / document
    for target, section in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", path.read_text()):
        aim = path.parent / target if target else path
        assert aim.exists(), f"{document}: {target}"
        if section:
            headings = re.findall(r"^#+ (.*)$", aim.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert section in anchors, f"{document}: no section #{section} in {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_the_documents_exist(document):
    for span in spans_of(document):
        for path in re.findall(rf"(?<![\w./])((?:{'|'.join(TOPS)})/[\w./*-]*)", span):
            path = path.rstrip(".")
            assert any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists(), f"{document}: {path}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_of_code_in_the_documents_exist(document):
    """`module.name` and `grpo.module.name`, where the first word is a module of ours."""
    for span in set(spans_of(document)) - names_of_others(document):
        match = re.fullmatch(r"((?:grpo|grpo_kernels)(?:\.\w+)+|\w+\.\w+)(\(.*\))?", span)
        if not match or match[1].endswith(
            (".py", ".json", ".jsonl", ".png", ".html", ".log", ".md", ".run", ".safetensors")
        ):
            continue
        first, *names = match[1].split(".")
        if document == "docs/python.md" and first == "run":  # what grpo.train returns there
            assert hasattr(grpo.Run, names[0]) or names[0] in vars(grpo.Run(ROOT, ROOT)), span
            continue
        if first in MODULES:
            names = [first, *names]
        elif first not in ("grpo", "grpo_kernels"):
            continue
        found = grpo_kernels if first == "grpo_kernels" else grpo
        for name in names:
            if not hasattr(found, name):
                found = importlib.import_module(f"{found.__name__}.{name}")
            else:
                found = getattr(found, name)


def test_the_map_of_the_architecture_names_every_module():
    map_of_tree = re.search(r"## Map\n.*?```\n(.*?)```", text_of("docs/architecture.md"), re.S)[1]
    named = set(re.findall(r"^  (\w+)(?:\.py|/)", map_of_tree, re.M)) | set(re.findall(r"(\w+)\.py\b", map_of_tree))
    assert named >= MODULES, f"the map does not name {sorted(MODULES - named)}"
    for name in re.findall(r"^  (\w+(?:\.py|/))", map_of_tree, re.M):
        assert (ROOT / "grpo" / name).exists(), f"the map names {name}"


# ---- LOG.md


def log_titles() -> dict[str, list[str]]:
    """Subject -> its titles, as they come."""
    subjects: dict[str, list[str]] = {}
    for marks, heading in re.findall(r"^(##|###) (.*)$", text_of("LOG.md"), re.M):
        if marks == "##":
            subjects[heading] = []
        else:
            subjects[next(reversed(subjects))].append(heading)
    return subjects


def test_the_log_is_by_subject_with_the_newest_first():
    assert list(log_titles()) == SUBJECTS
    for titles in log_titles().values():
        dates = [title[:10] for title in titles]
        assert dates == sorted(dates, reverse=True)


@pytest.mark.parametrize("title", [title for titles in log_titles().values() for title in titles])
def test_a_title_in_the_log_is_short_and_has_a_date_and_a_verdict(title):
    assert len(title) <= LONGEST_TITLE
    assert re.match(r"\d{4}-\d\d-\d\d \S", title)
    assert VERDICTS.search(title.partition(": ")[2]), f"no verdict behind the colon of {title!r}"


def test_what_cites_the_log_cites_one_of_its_titles():
    titles = [title for titles in log_titles().values() for title in titles]
    assert len(set(titles)) == len(titles)
    tracked = subprocess.run(["git", "ls-files", "*.py", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout
    files = [ROOT / name for name in tracked.splitlines()] or [*ROOT.rglob("*.py"), *ROOT.rglob("*.md")]
    for path in files:
        # A citation may go on in the next line of a comment.
        text = re.sub(r"\s*\n\s*(# )?", " ", path.read_text()) if path.exists() else ""
        for cited in re.findall(r"\"(\d{4}-\d\d-\d\d [^\"]+)\"", text):
            assert cited in titles, f"{path.relative_to(ROOT)} cites {cited!r}, which is no title in LOG.md"
        if path.suffix == ".py" and path != Path(__file__):
            bare = re.findall(r"(?<![\[/>])LOG\.md(?!, \"\d{4})", text)  # not [LOG.md](../LOG.md), nor a link's text
            assert not bare, f"{path.relative_to(ROOT)} names LOG.md without the title of an entry"
