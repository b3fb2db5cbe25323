"""The command line before anything is trained: flags, recipes, origins, whose task files run, what is printed."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from toy_task import TASK

from grpo.command import ALIASES, Options, parse
from grpo.config import PARTS, Config, field_names
from grpo.errors import UserError
from grpo.folder import new_run_folder, saved_run
from grpo.recipes import METHODS, RECIPES
from grpo.resolve import resolve
from grpo.run import main
from grpo.terminal import plain

SLOW = ("torch", "transformers", "datasets", "matplotlib")


@pytest.fixture
def toy(tmp_path):
    """A task file."""
    path = tmp_path / "toy.py"
    path.write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    return path


@pytest.fixture
def run_folder(toy, tmp_path):
    """The folder of a run of that task that has not taken a step."""
    return started(toy, tmp_path / "runs" / "toy")


def started(task_file, folder, **changes):
    """A run's folder with its config.json, as a run that was killed at once leaves it."""
    _, resolved = resolve([str(task_file)])
    folder.mkdir(parents=True)
    content = vars(resolved.as_saved(folder, "an id")) | {"config": vars(resolved.config)} | changes
    del content["folder"], content["unsaid"]
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--lr", "1"], ["none.py"], ["--steps", "2.5"], [], ["tasks/gsm8k.py", "--group-size", "1"]],
    ids=" ".join,
)
def test_help_and_wrong_command_lines_need_no_torch(words):
    code = f"""
import sys
from grpo.recipes import METHODS
from grpo.run import main
try:
    code = main({words!r})
except SystemExit as stopped:
    code = stopped.code
print("loaded", [name for name in {SLOW!r} if name in sys.modules], code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"loaded [] {0 if words == ['--help'] else 2}", done.stdout + done.stderr


def test_help_shows_the_parts_of_a_config_and_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for title in (
        "model options",
        "rollout options",
        "loss options",
        "update options",
        "held-out options",
        "run options",
    ):
        assert title in text
    listed = re.findall(r"--[a-z0-9-]+", text)
    assert {"--" + name.replace("_", "-") for name in field_names()} <= set(listed)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_help_of_a_method_shows_what_has_a_use_there(method, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        main(["--help"], method)
    text = capsys.readouterr().out
    listed = set(re.findall(r"^\W*--(?:no-)?([a-z0-9-]+)|\W{3,}--([a-z0-9-]+)", text, re.M))
    names = {(a or b).replace("-", "_") for a, b in listed}
    assert f"python -m grpo.{method}" in text and f"(default: {METHODS[method]['learning_rate']})" in text
    assert {"steps", "epochs", "data", "adapter", "max_completion_tokens"} <= names
    assert ("train_on" in names, "dpo_beta" in names, "reference" in names) == (
        (True, False, False) if method == "sft" else (False, True, True)
    )
    assert not names & {"group_size", "kl_coef", "advantage", "recipe", "method", "temperature"}


@pytest.mark.parametrize("flag", [["--group-size", "4"], ["--kl-coef", "0.1"], ["--reference", "start"]])
def test_a_flag_that_has_no_use_is_refused(flag, capsys):
    assert main(["gsm8k", "--model", "embedded", *flag], "sft") == 2
    assert "is of `python -m grpo.run`, and sft has no use for it" in capsys.readouterr().err


def test_a_config_is_each_of_its_parts():
    names = [name for part in PARTS for name in part.__dataclass_fields__]
    assert names == field_names()
    assert all(isinstance(Config(), part) for part in PARTS)
    with pytest.raises(UserError, match="eval_k is 9"):
        Config(eval_k=9)


def test_flags_and_task_file_come_in_any_order():
    for words in (["toy.py", "--steps", "3", "--no-mask-truncated"], ["--steps=3", "--no-mask-truncated", "toy.py"]):
        options, flags = parse(words)
        assert options == Options(task="toy.py")
        assert flags == {"steps": 3, "mask_truncated": False}
    assert parse(["toy.py", "--steps", "200"])[1] == {"steps": 200}  # given, although it is the default


def test_every_other_name_leads_to_a_flag():
    assert set(ALIASES.values()) <= set(field_names()) | set(Options.__dataclass_fields__)
    assert not set(ALIASES) & set(field_names())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--resume", ""], "--resume is ''"),
        (["--eval="], "--eval is ''"),
        (["--resume", "a\0b"], "--resume is 'a\\x00b'"),
        (["--eval", "X", "--resume", "Y"], "--resume and --eval are different things"),
        (["toy.py", "--check", "--resume", "Y"], "--check and --resume are different things"),
        (["toy.py", "--resume-or-start"], "--resume-or-start needs --run-dir"),
        (["toy.py", "other.py"], "no use for 'other.py'"),
        (["tasks/gsm8k.py", "--model", "a\0b"], "model is 'a\\x00b'"),
        (["to\0y.py"], "no task file to\\x00y.py"),
        (["/"], "/ is a folder, and a task is a Python file"),
        (["--eval", "/"], "/ is no run: neither metrics.jsonl"),
    ],
)
def test_words_that_do_not_go_together(words, told, capsys):
    assert main(words) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_its_fields_over_the_task_s_and_under_the_flags(name, toy):
    toy.write_text(toy.read_text().replace("Config(model=", "Config(clip_low=0.7, dual_clip=3.0, seed=5, model="))
    _, resolved = resolve([str(toy), "--recipe", name, "--kl-coef", "0.5"])
    recipe = RECIPES[name]
    assert {field: getattr(resolved.config, field) for field in recipe} == recipe | {"kl_coef": 0.5}
    assert {field for field, origin in resolved.origins.items() if origin == "recipe"} == recipe.keys() - {"kl_coef"}
    assert resolved.origins["kl_coef"] == "flag"
    assert (resolved.config.seed, resolved.origins["seed"]) == (5, "task")
    assert resolved.origins["base"] == "embedded"


def test_recipes_differ_and_say_the_same_fields_but_for_their_own():
    assert len({json.dumps(recipe, sort_keys=True) for recipe in RECIPES.values()}) == len(RECIPES)
    common = set.intersection(*(set(recipe) for recipe in RECIPES.values()))
    assert common >= {"objective", "advantage", "normalization", "clip_low", "clip_high", "kl_coef", "mask_truncated"}


def test_folders_are_stored_by_their_whole_paths(toy, tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    monkeypatch.chdir(tmp_path)
    _, resolved = resolve(["toy.py", "--model", "embedded", "--data", "rows"])
    assert resolved.config.data == str(tmp_path / "rows")
    assert resolved.as_saved(Path("run"), "").task == str(toy)
    toy.write_text(toy.read_text().replace('data="embedded"', 'data="rows"'))
    _, resolved = resolve(["toy.py", "--model", "embedded"])
    assert resolved.config.data == str(tmp_path / "rows")


def test_a_run_stays_where_its_command_is_given(toy, tmp_path, monkeypatch):
    """A task file may go to its data, and a reward to a folder of its own."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    toy.write_text(f"import os\nos.chdir({str(tmp_path / 'model')!r})\n{toy.read_text()}")
    _, resolved = resolve(["toy.py", "--run-dir", "mine", "--data", "model", "--model", "embedded"])
    assert resolved.config.run_dir == str(tmp_path / "mine")
    assert resolved.config.data == str(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    _, resolved = resolve(["toy.py", "--model", "embedded"])
    assert new_run_folder("toy", resolved.config, resolved.here).parent == tmp_path / "runs"


def test_two_runs_of_one_second_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [new_run_folder("toy", Config(), tmp_path) for _ in range(12)]  # in two seconds at most
    assert len(set(folders)) == 12
    assert all(folder.is_dir() for folder in folders)


def test_an_existing_run_dir_is_refused_before_the_rewards_are_tried(toy, tmp_path, capsys):
    toy.write_text(toy.read_text().replace('"""Something', 'raise KeyError("tried")\n    """Something'))
    assert main([str(toy), "--run-dir", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


# ---- whose task files run


def test_a_run_s_own_task_file_is_run_if_it_is_what_it_was(toy, run_folder, capsys):
    _, resolved = resolve(["--resume", str(run_folder)])
    assert resolved.task_path == str(toy)
    toy.write_text(toy.read_text() + 'raise SystemExit("run!")\n')
    for words in (["--resume", str(run_folder)], ["--eval", str(run_folder)]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "is not the file" in error
        assert f"{toy} --resume" in error
        assert "run!" not in error
    assert main([str(toy), "--resume", str(run_folder)]) == 2
    assert "run!" in capsys.readouterr().err  # named, it runs


def test_a_task_file_that_came_with_the_run_is_not_run(tmp_path, capsys):
    folder = tmp_path / "downloaded"
    inside = tmp_path / "inside.py"
    inside.write_text(TASK.format(rewards="{says: 1.0}", extra=""))
    started(inside, folder)
    moved = inside.rename(folder / "inside.py")
    saved = json.loads((folder / "config.json").read_text())
    for path in (moved, folder / ".." / "downloaded" / "inside.py"):
        (folder / "config.json").write_text(json.dumps(saved | {"task": str(path)}))
        assert main(["--resume", str(folder)]) == 2
        assert "in the run's own folder" in capsys.readouterr().err
    link = tmp_path / "link.py"
    link.symlink_to(moved)
    (folder / "config.json").write_text(json.dumps(saved | {"task": str(link)}))
    assert main(["--eval", str(folder)]) == 2
    assert "in the run's own folder" in capsys.readouterr().err


def test_a_task_file_that_is_gone_is_asked_for(toy, run_folder, capsys):
    moved = toy.rename(toy.with_name("moved.py"))
    assert main(["--resume", str(run_folder)]) == 2
    assert f"TASK.py --resume {run_folder}" in capsys.readouterr().err
    _, resolved = resolve([str(moved), "--resume", str(run_folder)])
    assert resolved.as_saved(run_folder, "").task == str(moved)


def test_a_model_s_folder_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert saved_run(str(tmp_path)) is None


# ---- what reaches the terminal

EVIL = "a\x1b[31mb\x9b2Jc\rd\u202ee\u2066f\u200fg\x07h\ud800i"


def test_what_a_terminal_would_obey_is_shown_instead():
    shown = plain(EVIL + "\n\tnaïve 答え 👩‍🔬 [red]")
    assert shown == (r"a\x1b[31mb\x9b2Jc\rd\u202ee\u2066f\u200fg\x07h\ud800i" + "\n\tnaïve 答え 👩‍🔬 [red]")


def test_what_libraries_log_of_a_downloaded_model_carries_no_codes():
    program = (
        "import logging; from grpo.terminal import plain_logs; plain_logs(); "
        "logging.basicConfig(format='%(message)s'); "
        "logging.getLogger('transformers.models').warning('a %s', '\\x1b[31mb'); "
        "logging.getLogger('reward').warning('a %s', '\\x1b[31mb')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "a \\x1b[31mb\na \x1b[31mb\n"


def test_errors_and_tables_carry_no_codes_nor_markup(toy, tmp_path, capsys):
    name = EVIL.replace("\ud800", "")
    assert main([str(tmp_path / name)]) == 2
    short = tempfile.mkdtemp()  # a long path would be shortened where it is shown
    run_dir = f"{short}/[red]:bug:{name}"
    Path(run_dir).mkdir()
    assert main([str(toy), "--run-dir", run_dir]) == 2
    output = capsys.readouterr()
    printed = output.out + output.err
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200e\u200f]", printed)
    assert r"[red]:bug:a\x1b[31mb" in output.err
    assert "[red]:bug:" in "".join(line.strip() for line in output.out.splitlines())
    shutil.rmtree(short)
