"""The program as its user meets it: command line, run folder, resume, bad input."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_task import SMALL, TASK

from grpo.embedded import MODEL_DIR
from grpo.folder import alone_in, list_checkpoints
from grpo.metrics import TIMING_PREFIXES
from grpo.run import main, resolve


@pytest.fixture
def task_file(tmp_path):
    def write(rewards="{letters: 1.0, says: 1.0}", extra="", text=TASK):
        path = tmp_path / "toy.py"
        path.write_text(text.format(rewards=rewards, extra=extra))
        return str(path)

    return write


def metrics_of(folder):
    """metrics.jsonl without what may differ between equal runs."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMING_PREFIXES)} for line in lines]


def run_toy(task_file, folder, *flags):
    assert main([task_file(), *SMALL, "--run-dir", str(folder), *flags]) == 0


def test_a_run_leaves_everything_it_promises(task_file, tmp_path, capsys):
    folder = tmp_path / "run"
    run_toy(task_file, folder, "--steps", "7", "--keep", "1", "--seed", "3")
    saved = json.loads((folder / "config.json").read_text())
    assert saved["config"]["seed"] == 3
    assert saved["origins"]["seed"] == "flag"
    assert saved["origins"]["model"] == "embedded"
    assert saved["origins"]["temperature"] == "default"
    steps = [line for line in metrics_of(folder) if "reward/mean" in line]
    assert [line["step"] for line in steps] == list(range(7))
    evaluations = [line["step"] for line in metrics_of(folder) if "eval/pass@1" in line]
    assert evaluations == [0, 4, 7]
    completions = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert len(completions) == 7 * 2 * 4
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events*"))
    assert "7 of 7" in re.sub("<[^>]*>", "", (folder / "report.html").read_text())
    names = {path.name for path in list_checkpoints(folder)}
    assert "step-000007" in names
    assert len(names) <= 2  # the last and, if it is another, the best
    out = capsys.readouterr().out
    assert "EMBEDDED DEFAULT" in out
    assert "a CUDA GPU" in out or torch.cuda.is_available()
    assert re.search(r"held-out pass@1: .* before, .* after", out.replace("\n", " "))


def test_equal_seeds_give_equal_runs_and_other_seeds_others(task_file, trained, tmp_path):
    run_toy(task_file, tmp_path / "a", "--steps", "4", "--save-every", "2")
    run_toy(task_file, tmp_path / "b", "--steps", "4", "--save-every", "2", "--seed", "2")
    assert metrics_of(tmp_path / "a") == metrics_of(trained) != metrics_of(tmp_path / "b")


def test_killed_and_resumed_equals_uninterrupted(task_file, tmp_path):
    """11 steps in one go, and 11 steps with a kill -9 somewhere in the middle: bit for bit the same."""
    argv = [task_file(), *SMALL, "--steps", "11"]
    assert main([*argv, "--run-dir", str(tmp_path / "whole")]) == 0

    killed_argv = [*argv, "--run-dir", str(tmp_path / "killed")]
    code = f"import sys; from grpo.run import main; sys.exit(main({killed_argv!r}))"
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    last_seen = random.Random().randint(4, 8)
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if re.match(rf"\s*{last_seen}/11\b", line):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert len(metrics_of(tmp_path / "killed")) < len(metrics_of(tmp_path / "whole"))
    assert main(["--resume", str(tmp_path / "killed")]) == 0

    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    for name in ("completions.jsonl", "prompts.jsonl", "held_out.jsonl", "tokens.jsonl"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        files = [tmp_path / run / "checkpoints" / "step-000011" / name for run in ("killed", "whole")]
        killed, whole = map(load_file, files)
        assert killed.keys() == whole.keys()
        assert all(torch.equal(killed[key], whole[key]) for key in whole)


def test_eval_scores_a_run_and_a_model(task_file, trained, capsys):
    assert main(["--eval", str(trained)]) == 0
    out = capsys.readouterr().out
    assert "step-" in out
    assert "95% interval" in out
    assert main([task_file(), "--eval", "embedded", "--eval-prompts", "4", "--max-completion-tokens", "7"]) == 0
    assert "pass@1" in capsys.readouterr().out


def test_eval_of_a_model_asks_the_task_s_own_questions(task_file, tmp_path, capsys):
    """Where a run would take the embedded default for want of a GPU, --eval MODEL scores that model on the task's data,
    or says that they cannot be had."""
    fails(["tasks/gsm8k.py", "--eval", str(MODEL_DIR)], capsys, "The data set openai/gsm8k is neither", "--data FOLDER")
    _, resolved = resolve(["tasks/gsm8k.py", "--eval", "org/some-model"])
    assert (resolved.config.model, resolved.config.data, resolved.config.max_completion_tokens) == (
        "org/some-model", "", 512)  # fmt: skip
    assert resolved.origins["model"] == "flag"
    assert resolved.missing == []
    _, tiny = resolve(["tasks/gsm8k.py", "--eval", "embedded"])
    assert (tiny.config.model, tiny.config.data, tiny.config.base) == ("embedded", "embedded", "float32")


def test_check_tries_every_row_and_trains_nothing(task_file, tmp_path, capsys):
    assert main([task_file(), "--check", "--run-dir", str(tmp_path / "run")]) == 0
    assert "8 training and 6 held-out rows" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("condition", "count"), [("True", "14 of 14"), ("answer == '4'", "1 of 14")])
def test_check_wants_a_score_for_every_gold_answer(condition, count, task_file, capsys):
    extra = f"def says(completion, answer):\n    return None if {condition} else 1.0"
    fails([task_file(extra=extra), "--check"], capsys, "`says`", "no score", f"{count} gold answers", "`solved`")


@pytest.mark.slow
def test_dynamic_sampling_fills_the_step_or_gives_up(task_file, tmp_path):
    sometimes = "def says(completion, answer):\n    return float(len(completion) % 2)"
    path = task_file(rewards="{says: 1.0}", extra=sometimes)
    flags = ["--steps", "3", "--dynamic-sampling", "--max-refills", "6"]
    argv = [path, *SMALL, "--run-dir", str(tmp_path / "filled"), *flags]
    gold_is_odd = TASK.replace('gold="The answer is {{answer}}."', 'gold="x"')
    Path(path).write_text(gold_is_odd.format(rewards="{says: 1.0}", extra=sometimes))
    assert main(argv) == 0
    steps = [line for line in metrics_of(tmp_path / "filled") if "reward/mean" in line]
    assert all(line["groups/trained"] == 2 for line in steps)

    never = "def says(completion, answer):\n    return 1.0"
    Path(path).write_text(gold_is_odd.format(rewards="{says: 1.0}", extra=never))
    assert main([path, *SMALL, "--run-dir", str(tmp_path / "never"), *flags]) == 0
    steps = [line for line in metrics_of(tmp_path / "never") if "reward/mean" in line]
    assert all(line["groups/trained"] == 0 and line["optim/grad_norm"] == 0 for line in steps)


@pytest.mark.parametrize(
    "flags",
    [
        "--mini-batches 2 --epochs 2 --objective gspo --kl-coef 0.1",
        "--advantage gdpo --normalization dr_grpo --correction sequence_mask --entropy-coef 0.01",
        pytest.param(
            "--advantage rloo --objective cispo --top-entropy 0.2 --off-policy-mask 0.5 --schedule cosine"
            " --warmup-steps 1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--base nf4 --recompute layer --dual-clip 3 --advantage lite_ppo --normalization grpo",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_choices_go_together(flags, task_file, tmp_path):
    run_toy(task_file, tmp_path / "run", "--steps", "2", *flags.split())
    last = [line for line in metrics_of(tmp_path / "run") if "reward/mean" in line][-1]
    assert last["optim/grad_norm"] > 0
    assert last["sync/moved"] > 0


# ---- bad input: one sentence, exit code 2, nothing lost


def fails(argv, capsys, *words):
    """The command ends with exit code 2 and one sentence with these words; no traceback."""
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    # But for that of a reward that ends the run.
    assert "Traceback" not in error.replace("The first of this step:\nTraceback", "")
    for word in words:
        assert word in error, error


def test_task_file_that_is_not_there(capsys, tmp_path):
    fails([str(tmp_path / "none.py")], capsys, "There is no task file", "none.py")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(:\n", ["line 1", "is not Python"]),
        ("x = 1\n", ["must define `task = Task(...)`"]),
        ("task = 3\n", ["must define `task = Task(...)`", "a int"]),
        ("import sys\nsys.exit(0)\n", ["SystemExit (0)", "line 2"]),
        ("import nothing_of_this_name\n", ["ModuleNotFoundError", "nothing_of_this_name"]),
    ],
)
def test_task_file_that_is_none(text, words, capsys, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(text)
    fails([str(path)], capsys, *words)


GREEDY = "def bad(completion): import torch; raise torch.OutOfMemoryError('CUDA out of memory')"


@pytest.mark.parametrize(
    ("extra", "rewards", "words"),
    [
        ("def bad(completion): return 1 / 0", "{bad: 1.0, says: 1.0}", ["`bad`", "ZeroDivisionError"]),
        ("def bad(completions): return [1.0]", "{bad: 1.0, says: 1.0}", ["`bad`", "length 1"]),
        ("def bad(completion): return 'good'", "{bad: 1.0, says: 1.0}", ["`bad`", "'good'"]),
        ("def bad(completion): return float('nan')", "{bad: 1.0, says: 1.0}", ["`bad`", "nan"]),
        ("def bad(completion, anwser): return 1.0", "{bad: 1.0, says: 1.0}", ["`bad`", "anwser", "Did you mean"]),
        (GREEDY, "{bad: 1.0, says: 1.0}", ["`bad`", "OutOfMemoryError", "mend the reward"]),
        ("", "{letters: 1.0}", ["`says`", "letters"]),
        ("", "{}", ["reward"]),
    ],
)
def test_reward_that_is_wrong(extra, rewards, words, task_file, capsys, tmp_path):
    fails([task_file(rewards, extra), "--run-dir", str(tmp_path / "run")], capsys, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_reward_that_fails_in_the_middle_loses_nothing(task_file, tmp_path, capsys):
    extra = """
calls = 0
def fragile(completions):
    global calls
    calls += 1
    if calls > LIMIT:
        raise RuntimeError("the judge is gone")
    return [0.5] * len(completions)
LIMIT = 20
"""
    # `letters` draws from a global generator before the other fails: that draw must not count.
    path = task_file("{letters: 1.0, fragile: 1.0, says: 1.0}", extra)
    folder = tmp_path / "run"
    flags = [*SMALL, "--steps", "40", "--max-reward-failures", "0", "--run-dir", str(folder)]
    fails([path, *flags], capsys, "`fragile`", "the judge is gone")
    done = [line["step"] for line in metrics_of(folder) if "reward/mean" in line]
    assert len(done) >= 3
    assert list_checkpoints(folder)[-1].name == f"step-{len(done):06d}"
    Path(path).write_text(Path(path).read_text().replace("LIMIT = 20", "LIMIT = 10**9"))
    steps = str(len(done) + 2)
    fails(["--resume", str(folder)], capsys, path, "is not the file", "name it")
    assert main([path, "--resume", str(folder), "--steps", steps]) == 0
    assert [line["step"] for line in metrics_of(folder) if "reward/mean" in line] == list(range(len(done) + 2))
    assert main([path, *SMALL, "--steps", steps, "--run-dir", str(tmp_path / "whole")]) == 0
    assert metrics_of(folder) == metrics_of(tmp_path / "whole")


# A reward of this task arms a hook of PyTorch's that calls, once, for more memory than any machine can address.
EXHAUST = """
import torch
from torch.nn.modules.module import register_module_forward_pre_hook as before_forward
from torch.optim.optimizer import register_optimizer_step_post_hook as after_update

def exhaust(*arguments):
    hook.remove()
    DEMAND

sizes = []
def patient(completions):
    global hook
    sizes.append(len(completions))
    if sizes.count(SIZE) == TIMES:
        hook = HOOK(exhaust)
    return [len(set(completion[0]["content"])) / 10 for completion in completions]
"""
# Completions scored at once: what comes next is an update, or a rollout. The preflight has five calls of a step's size.
STEP, EVALUATION = "8", "24"
ON_A_CPU = "torch.empty(10**15)"
ON_A_GPU = "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a capacity of')"
WARMING_UP = "raise RuntimeError('CUDA out of memory occurred when warming up sampler with 512 dummy requests.')"

PATIENT = [*SMALL, "--eval-samples", "6", "--eval-every", "2", "--steps", "6"]


def patient_task(size="-1", times="-1", hook="before_forward", demand="pass"):
    extra = EXHAUST.replace("SIZE", size).replace("TIMES", times).replace("HOOK", hook).replace("DEMAND", demand)
    return TASK.format(rewards="{patient: 1.0, says: 1.0}", extra=extra)


@pytest.fixture(scope="module")
def untroubled_metrics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untroubled")
    (folder / "toy.py").write_text(patient_task())
    assert main([str(folder / "toy.py"), *PATIENT, "--run-dir", str(folder / "run")]) == 0
    return metrics_of(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "times", "hook", "demand", "words"),
    [
        (EVALUATION, "2", "before_forward", ON_A_CPU, ["this machine", "4000000000000000 bytes"]),
        (STEP, "7", "after_update", ON_A_GPU, ["the GPU", "20.00 GiB"]),
        (STEP, "10", "after_update", ON_A_CPU, ["this machine", "4000000000000000 bytes"]),
        (EVALUATION, "2", "before_forward", WARMING_UP, ["the GPU ran out"]),
    ],
    ids=["rollout", "update on a GPU", "update", "warming up"],
)
def test_memory_that_runs_out_is_told_and_nothing_is_lost(
    size, times, hook, demand, words, untroubled_metrics, tmp_path, capsys
):
    path, folder = tmp_path / "toy.py", tmp_path / "run"
    path.write_text(patient_task(size, times, hook, demand))
    flags_to_lower = ["--max-completion-tokens (7)", "--group-size (4)", "--base nf4"]
    argv = [str(path), *PATIENT, "--run-dir", str(folder)]
    fails(argv, capsys, *words, *flags_to_lower, f"--resume {folder}`")
    assert 1 <= len([line for line in metrics_of(folder) if "reward/mean" in line]) <= 4
    path.write_text(patient_task())
    assert main([str(path), "--resume", str(folder), "--tokens-per-batch", "16000"]) == 0
    assert metrics_of(folder) == untroubled_metrics


INTERRUPTED = """
sizes = []
def patient(completions):
    sizes.append(len(completions))
    if sizes[-1] == 24 and sizes.count(24) == TIMES:
        raise KeyboardInterrupt
    return [len(set(completion[0]["content"])) / 10 for completion in completions]
"""


@pytest.mark.slow
@pytest.mark.parametrize(("times", "done"), [("2", 2), ("4", 6)], ids=["in the middle", "the last"])
def test_an_interrupted_evaluation_is_made_up(times, done, untroubled_metrics, tmp_path, capsys):
    path, folder = tmp_path / "toy.py", tmp_path / "run"
    path.write_text(TASK.format(rewards="{patient: 1.0, says: 1.0}", extra=INTERRUPTED.replace("TIMES", times)))
    assert main([str(path), *PATIENT, "--run-dir", str(folder)]) == 130
    assert list_checkpoints(folder)[-1].name == f"step-{done:06d}"
    assert metrics_of(folder)[-1]["step"] == done - 1
    path.write_text(patient_task())
    assert main([str(path), "--resume", str(folder)]) == 0
    assert metrics_of(folder) == untroubled_metrics
    resumed = metrics_of(folder)
    assert main(["--resume", str(folder)]) == 0  # and then it is not due again
    assert metrics_of(folder) == resumed
    last = f"{untroubled_metrics[-1]['eval/pass@1']:.1%}"
    compared = [line for line in capsys.readouterr().out.splitlines() if line.startswith("held-out pass@1:")]
    assert [f", {last}" in line for line in compared] == [True, True]


def test_memory_that_runs_out_before_the_first_step(task_file, tmp_path, capsys):
    folder = tmp_path / "run"
    huge = ["--lora-rank", str(10**13), "--base", "nf4"]
    fails([task_file(), "--run-dir", str(folder), *huge], capsys, "memory of this machine ran out", "no checkpoint")
    assert not folder.exists()
    assert main([task_file(), "--eval", "embedded", *huge]) == 2
    error = capsys.readouterr().err
    assert "memory of this machine ran out" in error
    assert "--base nf4" not in error


def test_data_that_is_wrong(capsys, tmp_path):
    gsm8k = "tasks/gsm8k.py"
    fails([gsm8k, "--data", str(tmp_path / "none")], capsys, "There is no file or folder")
    data = tmp_path / "data"
    data.mkdir()
    fails([gsm8k, "--data", str(data)], capsys, "train.jsonl")
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("")
    fails([gsm8k, "--data", str(data)], capsys, "is empty")
    (data / "train.jsonl").write_text('{"query": "1 + 1?", "answer": "#### 2"}\n')
    fails([gsm8k, "--data", str(data)], capsys, "no column 'question'")
    (data / "train.jsonl").write_text('{"question": "1 + 1?", "answer": "2, without the mark"}\n')
    fails([gsm8k, "--data", str(data)], capsys, "`rows` of task gsm8k raised ValueError")
    (data / "train.jsonl").write_text("{not json}\n")
    fails([gsm8k, "--data", str(data)], capsys, "line 1 is not JSON")
    for split in ("train", "test"):
        row = json.dumps({"question": f"How many to {split}? " * 2000, "answer": "#### 2"})
        (data / f"{split}.jsonl").write_text(row + "\n")
    fails([gsm8k, "--data", str(data)], capsys, "The prompt of row 0 has", "fit")


def test_model_that_cannot_be_had(task_file, capsys):
    fails([task_file(), "--model", "org/does-not-exist"], capsys, "org/does-not-exist", "--model embedded")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--group-size 1", ["group_size is 1", "Use 2 or more"]),
        ("--learning-rate 0", ["learning_rate"]),
        ("--max-completion-tokens 5000", ["Lower it"]),
        ("--eval-k 9", ["eval_k is 9"]),
        ("--max-context 100000", ["was built for"]),
    ],
)
def test_flags_that_cannot_be(flags, words, task_file, capsys):
    fails([task_file(), *flags.split()], capsys, *words)


def test_a_gpu_that_is_not_there(task_file, capsys):
    if not torch.cuda.is_available():
        fails([task_file(), "--device", "cuda"], capsys, "sees no GPU")


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--learning-rat", "--learning-rate"),
        ("--lr", "--learning-rate"),
        ("--num_generations", "--group-size"),
        ("--beta=0.1", "--kl-coef"),
        ("--no-mask-truncate", "--mask-truncated"),
    ],
)
def test_a_flag_that_does_not_exist_is_told_with_the_one_that_is_meant(flag, named, task_file, capsys):
    fails([task_file(), flag, "3"], capsys, "There is no flag", f"`{named}`")
    fails([flag, "3", task_file()], capsys, "There is no flag", f"`{named}`")


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "--clip-high" in text
    assert "leaves room for rare tokens" in text


def test_a_run_folder_is_never_overwritten(task_file, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    fails([task_file(), *SMALL, "--run-dir", str(tmp_path / "run")], capsys, "exists already", "--resume")


def test_a_run_goes_on_in_one_process_only(toy_run, capsys):
    written = (toy_run / "metrics.jsonl").read_text()
    with alone_in(toy_run):
        fails(["--resume", str(toy_run), "--steps", "5"], capsys, f"Another process is training in {toy_run}")
    assert (toy_run / "metrics.jsonl").read_text() == written


def test_a_run_does_not_go_on_to_fewer_steps(toy_run, capsys):
    saved = (toy_run / "config.json").read_text()
    fails(["--resume", str(toy_run), "--steps", "3"], capsys, "has done 4 steps, more than --steps 3 asks for")
    assert (toy_run / "config.json").read_text() == saved


def test_checkpoints_that_are_not_ours_or_damaged(toy_run, tmp_path, capsys):
    folder = toy_run
    fails(["--resume", str(tmp_path / "none")], capsys, "no run folder")
    last = list_checkpoints(folder)[-1]
    weights = last / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    fails(["--resume", str(folder), "--steps", "6"], capsys, "damaged", "another checkpoint of")
    weights.unlink()
    fails(["--resume", str(folder), "--steps", "6"], capsys, "damaged")
    (last / "state.json").write_text('{"format": "somebody else\'s"}')
    fails(["--resume", str(folder), "--steps", "6"], capsys, "is not a checkpoint of this program")
    earlier = list_checkpoints(folder)[-2]
    assert main(["--resume", str(earlier), "--steps", "6"]) == 0
    fails(["--resume", str(folder), "--steps", "9", "--lora-rank", "5"], capsys, "lora", "5")


@pytest.mark.slow
def test_an_earlier_checkpoint_is_gone_on_from_and_the_later_ones_are_left(task_file, tmp_path, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    flags = ["--save-every", "2", "--keep", "4", "--eval-every", "3"]
    run_toy(task_file, whole, "--steps", "7", *flags)
    run_toy(task_file, folder, "--steps", "8", *flags)
    stale = folder / "checkpoints" / "left-step-000008"
    stale.mkdir()
    capsys.readouterr()
    assert main(["--resume", str(folder / "checkpoints" / "step-000004"), "--steps", "7", "--keep", "2"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "step-000006" in line and "step-000008" in line]
    assert {path.name for path in list_checkpoints(folder)} >= {"step-000006", "step-000007"}
    assert not (folder / "checkpoints" / "step-000008").exists()
    assert metrics_of(folder) == metrics_of(whole)
    assert main(["--resume", str(folder), "--steps", "8"]) == 0
    assert main(["--eval", str(folder)]) == 0
    fails(["--resume", str(stale)], capsys, "was left", f"--resume {folder}")
    assert main(["--eval", str(stale)]) == 0


def test_what_a_user_puts_beside_the_checkpoints_is_none(toy_run):
    folder = toy_run
    last = list_checkpoints(folder)[-1]
    shutil.copytree(last, folder / "checkpoints" / "step-000004-mine")
    (folder / "checkpoints" / "step-000005.tar.gz").write_text("packed")
    (folder / "checkpoints" / "step-000009").write_text("a file")
    assert list_checkpoints(folder)[-1] == last
    assert main(["--resume", str(folder), "--steps", "6", "--keep", "1"]) == 0
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {"step-000004-mine", "step-000005.tar.gz", "step-000009", "step-000006"} <= names


def changed(path, change):
    """The JSON of a file as text, with something changed in it."""
    content = json.loads(path.read_text())
    change(content)
    return json.dumps(content)


@pytest.mark.slow
def test_files_of_a_run_that_are_gone_or_damaged_are_named(toy_run, tmp_path, capsys):
    folder = toy_run
    last = list_checkpoints(folder)[-1]
    state, config, metrics = last / "state.json", folder / "config.json", folder / "metrics.jsonl"
    zeros = metrics.read_text().splitlines(keepends=True)
    zeros[1] = "\0" * (len(zeros[1]) - 1) + "\n"
    damages = [
        (state, changed(state, lambda read: read.pop("files")), ["state.json", "damaged", "another checkpoint"]),
        (state, changed(state, lambda read: read["progress"].update(step=2)), ["state.json", "damaged"]),
        (state, changed(state, lambda read: read.pop("sha256")), ["state.json", "damaged"]),
        (state, changed(state, lambda read: read.update(format="grpo-checkpoint-1")), ["another version", "PeftModel"]),
        (state, "[" * 100_000, ["state.json", "cannot be read"]),
        (config, changed(config, lambda read: read.pop("config")), ["config.json", "'config'"]),
        (config, changed(config, lambda read: read["config"].update(steps="ten")), ["config.json", "steps"]),
        (config, changed(config, lambda read: read["config"].update(group_size=4.5)), ["config.json", "group_size"]),
        (config, changed(config, lambda read: read.update(config=[])), ["config.json"]),
        (config, changed(config, lambda read: read.pop("id")), ["config.json", "earlier version"]),
        (config, changed(config, lambda read: read.update(task=3)), ["config.json", "task is 3"]),
        (config, changed(config, lambda read: read["origins"].update(steps=[1])), ["the origin of steps is [1]"]),
        (config, "[]", ["config.json"]),
        (config, "[" * 100_000, ["config.json"]),
        (config, None, ["config.json is missing"]),
        (metrics, "".join(zeros), ["metrics.jsonl", "line 2"]),
        (metrics, None, ["metrics.jsonl", "taken it away"]),
    ]
    for file, damaged, words in damages:
        whole = file.read_text()
        file.unlink() if damaged is None else file.write_text(damaged)
        fails(["--resume", str(folder), "--steps", "5"], capsys, *words)
        file.write_text(whole)
    assert main(["--resume", str(folder / "checkpoints"), "--steps", "5"]) == 0
    fails(["--resume", str(folder / "checkpoints" / "step-000009")], capsys, "no checkpoint", "step-000009")
    fails(["--resume", str(tmp_path)], capsys, "neither metrics.jsonl nor a checkpoint")


@contextmanager
def files_of_at_most(size):
    """A limit on file sizes is the disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def six_steps(trained, tmp_path_factory):
    """That run after two further steps."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("six") / "run")
    assert main(["--resume", str(folder), "--steps", "6"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "full_for", ["curves.png", "completions.jsonl", "tokens.jsonl", "metrics.jsonl", "config.json"]
)
def test_a_full_disk_is_told_and_what_is_saved_stays(full_for, toy_run, six_steps, capsys):
    folder, saved = toy_run, len((toy_run / "config.json").read_text())
    sizes = {"curves.png": 12_000}
    sizes |= {name: (folder / name).stat().st_size + 100 for name in ("completions.jsonl", "tokens.jsonl")}
    sizes |= {"metrics.jsonl": (folder / "metrics.jsonl").stat().st_size + 50, "config.json": saved // 2}
    with files_of_at_most(sizes[full_for]):
        fails(["--resume", str(folder), "--steps", "6"], capsys, "could not be written", "step-000004", "more room")
    assert main(["--resume", str(folder), "--steps", "6"]) == 0
    assert metrics_of(folder) == metrics_of(six_steps)


def test_a_full_disk_leaves_the_last_good_checkpoint(toy_run, six_steps, capsys):
    """The optimizer's file is the largest, the logs are small."""
    before = {path.name for path in (toy_run / "checkpoints").iterdir()}
    largest = max(path.stat().st_size for path in list_checkpoints(toy_run)[-1].iterdir())
    with files_of_at_most(largest - 1):
        fails(["--resume", str(toy_run), "--steps", "6"], capsys, "could not be written", "step-000004", "more room")
    assert {path.name for path in (toy_run / "checkpoints").iterdir()} == before
    assert main(["--resume", str(toy_run), "--steps", "6"]) == 0
    assert metrics_of(toy_run) == metrics_of(six_steps)


@pytest.mark.slow
def test_a_full_disk_at_the_first_checkpoint_is_told_with_what_fits(task_file, trained, tmp_path, capsys):
    folder = tmp_path / "run"
    largest = max(path.stat().st_size for path in list_checkpoints(trained)[-1].iterdir())
    with files_of_at_most(largest - 1):
        argv = [task_file(), *SMALL, "--steps", "1", "--run-dir", str(folder)]
        fails(
            argv,
            capsys,
            "could not be written",
            f"start over in the same folder with `python -m grpo.run --resume {folder}`",
        )
    assert main(["--resume", str(folder)]) == 0


def test_a_run_keeps_its_task_and_its_folder(task_file, toy_run, tmp_path, capsys):
    folder = toy_run
    before = metrics_of(folder)
    fails(["tasks/reverse.py", "--resume", str(folder), "--steps", "5"], capsys, "task reverse", "run of task toy")
    other = str(tmp_path / "other")
    fails(["--resume", str(folder), "--steps", "5", "--run-dir", other], capsys, "--run-dir", "its own folder")
    assert metrics_of(folder) == before
    moved = Path(task_file()).rename(tmp_path / "moved.py")
    assert main([str(moved), "--resume", str(folder), "--steps", "5"]) == 0


def test_a_folder_to_score_that_is_not_there(tmp_path, capsys):
    fails(["--eval", str(tmp_path / "typo")], capsys, "There is no folder", "typo")
    fails(["--eval", str(tmp_path)], capsys, "is no run", "give the task file")


def test_the_origin_of_every_value_is_known(task_file):
    _, resolved = resolve([task_file(), "--clip-low", "0.1", "--seed=4"])
    assert resolved.origins["clip_low"] == "flag"
    assert resolved.origins["seed"] == "flag"
    assert resolved.origins["base"] == "embedded"
    assert resolved.config.clip_low == 0.1
    _, explicit = resolve([task_file(), "--model", "embedded", "--base", "nf4"])
    assert explicit.missing == []
    assert explicit.config.base == "nf4"


@pytest.mark.slow
def test_a_resumed_run_keeps_the_origin_of_every_value(task_file, tmp_path, capsys):
    folder = tmp_path / "run"
    run_toy(task_file, folder, "--steps", "2", "--clip-low", "0.1")
    begun = json.loads((folder / "config.json").read_text())
    shown = shown_origins(capsys)
    assert main(["--resume", str(folder), "--steps", "3", "--temperature", "0.9"]) == 0
    resumed = json.loads((folder / "config.json").read_text())
    assert resumed["origins"] == begun["origins"] | {"steps": "flag", "temperature": "flag"}
    assert resumed["config"] == begun["config"] | {"steps": 3, "temperature": 0.9}
    assert begun["origins"] | {"model": "embedded", "clip_low": "flag", "clip_high": "default"} == begun["origins"]
    assert "clip_low flag" in shown
    assert shown_origins(capsys) == sorted([*shown, "temperature flag"])


def shown_origins(capsys):
    """The fields in the printed table, each with its origin."""
    rows = re.findall(r"^(\w+) +\S+ +(task|embedded|flag) *$", capsys.readouterr().out, re.MULTILINE)
    return sorted(f"{field} {origin}" for field, origin in rows)
