"""Runs that are taught: by gold answers, messages and pairs; what they write, how they go on, and where they lead."""

import json
import shutil

import pytest
import torch
from toy_task import SMALL, TASK

from grpo import dpo, sft
from grpo.checkpoint import read_state
from grpo.folder import list_checkpoints
from grpo.run import main

FLAGS = [flag for flag in SMALL if flag != "--no-mask-truncated"]
FLAGS = FLAGS[: FLAGS.index("--group-size")] + FLAGS[FLAGS.index("--group-size") + 2 :]
OF_ROWS = ["--model", "embedded", "--base", "float32", "--held-out", "2", *FLAGS]


def chat(number, answer):
    return [{"role": "user", "content": f"What is {number} + 2?"}, {"role": "assistant", "content": answer}]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("taught")


@pytest.fixture(scope="module")
def toy(folder):
    path = folder / "toy.py"
    path.write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    return str(path)


@pytest.fixture(scope="module")
def pairs(folder):
    rows = [
        {"prompt": chat(n, "")[:1], "chosen": chat(n, f"It is {n + 2}.")[1:], "rejected": chat(n, "No idea.")[1:]}
        for n in range(9)
    ]
    return written(folder / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def messages(folder):
    return written(folder / "messages.jsonl", [{"messages": chat(n, f"It is {n + 2}.")} for n in range(9)])


@pytest.fixture(scope="module")
def of_gold(toy, folder):
    """A run on the gold answers of a task, stopped nowhere."""
    assert sft.main([toy, *FLAGS, "--steps", "6", "--run-dir", str(folder / "gold")]) == 0
    return folder / "gold"


@pytest.fixture(scope="module")
def of_pairs(pairs, folder):
    assert dpo.main(["--data", pairs, *OF_ROWS, "--epochs", "2", "--run-dir", str(folder / "dpo")]) == 0
    return folder / "dpo"


def lines(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_a_task_is_learnt_from_its_gold_answers(of_gold):
    steps = [line for line in lines(of_gold) if "policy/loss" in line]
    assert len(steps) == 6 and steps[-1]["policy/loss"] < 0.7 * steps[0]["policy/loss"]
    scores = [line for line in lines(of_gold) if "eval/pass@1" in line]
    assert [line["step"] for line in scores] == [0, 4, 6]  # the policy answers held-out prompts
    assert scores[-1]["eval/loss"] < scores[0]["eval/loss"]
    taught = lines(of_gold, "completions.jsonl")
    assert {line["text"] for line in taught} == {f"The answer is {2 * n + 2}." for n in range(8)}
    assert {line["advantage"] for line in taught} == {1.0} and {line["reward"] for line in taught} == {None}
    assert json.loads((of_gold / "config.json").read_text())["config"]["method"] == "sft"
    for name in ("report.html", "curves.png", "checkpoints/step-000006/adapter_model.safetensors", "best"):
        assert (of_gold / name).exists()


def test_a_run_of_pairs_prefers_the_better_answers(of_pairs):
    steps = [line for line in lines(of_pairs) if "policy/loss" in line]
    assert len(steps) == 7  # 7 pairs twice, 2 a step
    assert steps[0]["dpo/margin"] == 0 and steps[-1]["dpo/margin"] > 0.1 and steps[-1]["dpo/accuracy"] == 1
    scores = [line for line in lines(of_pairs) if "eval/accuracy" in line]
    assert scores[0]["eval/accuracy"] == 0.5 and scores[-1]["eval/accuracy"] == 1
    assert scores[-1]["eval/loss"] < scores[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-5)
    held_out = lines(of_pairs, "held_out.jsonl")
    assert {"implicit"} == set(held_out[-1]["parts"]) and held_out[-1]["reward"] == 1
    page = (of_pairs / "report.html").read_text()
    assert '<dd>7 <span class="dim">of 7</span>' in page and "tokens taught" in page
    assert "<b>chosen</b>" in page and "<b>rejected</b>" in page and "advantage +" not in page


def test_of_equal_scores_the_lower_loss_is_the_best(of_pairs):
    """Two held-out pairs are both right from the first score after the start on: the later checkpoint is surer."""
    scores = {line["step"]: line for line in lines(of_pairs) if "eval/accuracy" in line}
    best = max(scores, key=lambda step: (scores[step]["eval/accuracy"], -scores[step]["eval/loss"], -step))
    tied = [step for step in scores if scores[step]["eval/accuracy"] == scores[best]["eval/accuracy"]]
    assert len(tied) > 1 and best != tied[0]
    assert (of_pairs / "best").read_text() == f"checkpoints/step-{best:06d}\n"
    remembered = read_state(of_pairs / "checkpoints" / "step-000006")[0]  # between the two
    assert (remembered.best_step, remembered.best_tie) == (tied[0], -scores[tied[0]]["eval/loss"])


@pytest.mark.slow
def test_an_epoch_of_messages_is_all_of_them(messages, folder):
    run = folder / "messages"
    assert sft.main(["--data", messages, *OF_ROWS, "--save-every", "9", "--run-dir", str(run)]) == 0
    steps = [line for line in lines(run) if "policy/loss" in line]
    assert len(steps) == 4 and steps[-1]["lessons/epoch"] == 8 / 7  # 7 rows, 2 a step
    assert len({line["prompt"] for line in lines(run, "completions.jsonl")[:7]}) == 7
    scores = [line for line in lines(run) if "eval/logprob" in line]
    assert scores[-1]["eval/logprob"] > scores[0]["eval/logprob"]
    assert scores[-1]["eval/loss"] == -scores[-1]["eval/logprob"]
    assert scores[0]["eval/logprob/low"] < scores[0]["eval/logprob"] < scores[0]["eval/logprob/high"]


SAME = ("metrics.jsonl", "completions.jsonl", "held_out.jsonl", "prompts.jsonl", "tokens.jsonl")


def untimed(run, name):
    return [
        {key: value for key, value in line.items() if not key.startswith(("time/", "speed/", "memory/"))}
        for line in lines(run, name)
    ]


@pytest.mark.parametrize("kind", ["of_gold", pytest.param("of_pairs", marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_run_uninterrupted(kind, request, folder):
    whole = request.getfixturevalue(kind)
    resumed = folder / f"resumed-{kind}"
    shutil.copytree(whole, resumed)
    steps = [path.name for path in sorted((resumed / "checkpoints").glob("step-*"))]
    assert steps[0] < steps[-1]
    assert main(["--resume", str(resumed / "checkpoints" / steps[0])]) == 0
    for name in SAME:
        assert untimed(resumed, name) == untimed(whole, name)
    assert (resumed / "best").read_text() == (whole / "best").read_text()
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        ours, theirs = (run / "checkpoints" / steps[-1] / file for run in (resumed, whole))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_what_was_taught_is_what_the_next_run_begins_from(of_gold, pairs, toy, folder, capsys):
    after = ["--adapter", str(of_gold), "--steps", "1", "--eval-every", "0"]
    assert main([toy, *SMALL, *after, "--run-dir", str(folder / "then-grpo")]) == 0
    first = lines(folder / "then-grpo")[0]
    last = [line for line in lines(of_gold) if "eval/pass@1" in line][-1]
    assert read_state(folder / "then-grpo" / "checkpoints" / "step-000001")[0].start
    assert first["eval/pass@1"] == last["eval/pass@1"]  # the same prompts, the same policy, the same seeds
    start = ["--steps", "1", "--eval-every", "0", "--adapter", str(of_gold)]
    assert dpo.main(["--data", pairs, *OF_ROWS, *start, "--run-dir", str(folder / "then-dpo")]) == 0
    [step] = [line for line in lines(folder / "then-dpo") if "policy/loss" in line]
    assert step["dpo/margin"] == 0  # the reference is what the run began from


@pytest.mark.slow
def test_a_run_goes_on_for_longer_by_steps_or_by_epochs(of_pairs, folder, capsys):
    longer = folder / "longer"
    shutil.copytree(of_pairs, longer)  # of 7 steps, which are 2 epochs of 7 pairs
    assert main(["--resume", str(longer), "--steps", "8"]) == 0
    assert len([line for line in lines(longer) if "policy/loss" in line]) == 8
    assert main(["--resume", str(longer), "--epochs", "3"]) == 0
    assert len([line for line in lines(longer) if "policy/loss" in line]) == 11


def test_a_run_keeps_what_it_learns_from(of_gold, trained, capsys):
    assert dpo.main(["--resume", str(of_gold)]) == 2
    told = capsys.readouterr().err
    assert "is a run of sft, and dpo is asked for" in told and "--adapter" in told
    assert sft.main(["--resume", str(trained)]) == 2
    assert "is a run of grpo, and sft is asked for" in capsys.readouterr().err


def test_a_run_is_scored_as_it_was(of_gold, of_pairs, capsys):
    assert main(["--eval", str(of_gold)]) == 0
    assert "pass@1" in capsys.readouterr().out
    page = (of_pairs / "report.html").read_text()
    assert "Held-out accuracy" in page and "tokens of an answer" in page
    for of_rollouts in ("Suspects", "sampler gap", "rewards disagree", "mean reward", "policy/entropy", "best paid"):
        assert of_rollouts not in page
    assert main(["--eval", str(of_pairs)]) == 0
    out = capsys.readouterr().out
    assert "accuracy 100.0%" in out and "2 held-out pairs" in out


@pytest.mark.parametrize(
    ("command", "flags", "told"),
    [
        (sft, ["--clip-low", "0.1"], "--clip-low is of `python -m grpo.run`, and sft has no use for it"),
        (sft, ["--dpo-beta", "0.2"], "--dpo-beta is of `python -m grpo.dpo`"),
        (dpo, ["--train-on", "assistant"], "--train-on is of `python -m grpo.sft`"),
        (sft, ["--recipe", "dapo"], "--recipe is of GRPO's objective"),
        (sft, ["--method", "dpo"], "--method is dpo, and the command is `python -m grpo.sft`"),
        (sft, ["--temperature", "0.5"], "temperature is 0.5"),
        (sft, ["--steps", "3", "--epochs", "2"], "both say how long the run is"),
    ],
)
def test_flags_that_do_not_go_together_are_told(command, flags, told, toy, capsys):
    assert command.main([toy, *flags]) == 2
    assert told in capsys.readouterr().err


def test_a_flag_of_sft_is_of_no_use_to_grpo(toy, capsys):
    assert main([toy, "--train-on", "assistant"]) == 2
    assert "--train-on is of `python -m grpo.sft`, and grpo has no use for it" in capsys.readouterr().err


def test_rows_that_cannot_be_taught_are_told_by_check_too(folder, messages, capsys):
    bad = written(
        folder / "bad.jsonl",
        [{"messages": chat(n, f"It is {n + 2}.")} for n in range(5)]
        + [{"messages": chat(7, " ")}, {"messages": chat(8, "8")[:1]}],
    )
    assert sft.main(["--data", bad, *OF_ROWS, "--check"]) == 2
    told = capsys.readouterr().err
    assert "cannot be taught" in told and "row 6" in told and "--skip-bad-rows" in told
    assert sft.main(["--data", messages, *OF_ROWS, "--prompts-per-step", "8", "--check"]) == 0
    out = capsys.readouterr().out
    assert "note: a step has 8 answers and there are 7: some come more than once" in out
    assert "7 answers to learn from and 2 held out" in out and "what is taught behind the first" in out


def test_rows_of_public_forms_are_taught_and_texts_are_told_of(folder, capsys):
    """The same answers in ShareGPT's form, in Alpaca's and in texts: the first two are the same chats."""
    shared = [[{"from": "human", "value": f"{n} + 2?"}, {"from": "gpt", "value": str(n + 2)}] for n in range(9)]
    alpaca = [{"instruction": f"{n} + 2?", "input": "", "output": str(n + 2)} for n in range(9)]
    told = []
    for name, rows in {
        "shared": [{"conversations": chat} for chat in shared],
        "alpaca": alpaca,
        "texts": [{"prompt": row["instruction"], "completion": row["output"]} for row in alpaca],
    }.items():
        assert sft.main(["--data", written(folder / f"{name}.jsonl", rows), *OF_ROWS, "--check"]) == 0
        told.append(capsys.readouterr().out.partition("held-out rows of")[2].replace(f"{name}.jsonl", ""))
    assert told[0] == told[1] and "[<|im_start|>][user]" in told[0] and "go through no chat template" not in told[0]
    assert "are texts, which go through no chat template, and the model has one" in told[2]


def test_nothing_is_left_on_the_globals(of_gold):
    assert torch.is_grad_enabled()


def test_rows_without_a_task_file_score_a_model_and_an_adapter_over_its_base(of_pairs, pairs, messages, capsys):
    rows = ["--held-out", "2", "--threads", "1"]
    assert sft.main(["--data", messages, *rows, "--eval", "embedded"]) == 0
    assert "2 held-out answers" in capsys.readouterr().out
    adapter = str(list_checkpoints(of_pairs)[-1])
    assert dpo.main(["--data", pairs, *rows, "--eval", "embedded", "--base", "float32", "--adapter", adapter]) == 0
    margin = capsys.readouterr().out.partition("margin ")[2].split()[0]
    last = [line["eval/margin"] for line in lines(of_pairs) if "eval/margin" in line][-1]
    assert float(margin) == pytest.approx(last, abs=2e-3) and last > 0.01


@pytest.mark.parametrize("flags", [[], ["--adapter", "A", "--reference", "start"]])
def test_what_would_be_compared_with_itself_is_not_scored(flags, pairs, capsys):
    assert dpo.main(["--data", pairs, "--held-out", "2", "--eval", "embedded", *flags]) == 2
    assert "would be compared with itself: every margin is 0" in capsys.readouterr().err
    assert dpo.main(["--held-out", "2", "--eval", "nowhere/x"]) == 2
    assert "There is no folder nowhere/x" in capsys.readouterr().err
