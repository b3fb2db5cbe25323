"""The learning benchmark: what is taught is what was meant, batches lose nothing, the report says what runs held."""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import learning_report
import learning_task
import learning_teach
from half_teaching import IGNORED, careful, notes_of_word_problem, slipping
from learning_table import learning

from grpo.config import Config
from grpo.embedded import MODEL_DIR
from grpo.embedded.problems import split_of
from grpo.rewards import correctness


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    row = {"question": "How far?", "answer": "It is 1,000+80 = <<1000+80=1080>>1,080 miles.\n#### 1,080"}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    tokens, lengths, num_prompt = map(torch.from_numpy, learning_teach.make_shard(0, 300, str(folder), 4, seed=0))
    return learning_teach.Corpus(tokens, lengths, num_prompt)


def texts(corpus, tokenizer):
    """(prompt, completion) of every example."""
    pairs = zip(corpus.tokens.split(corpus.lengths.tolist()), corpus.num_prompt.tolist(), strict=True)
    return [(tokenizer.decode(tokens[:n]), tokenizer.decode(tokens[n:])) for tokens, n in pairs]


def test_the_class_answers_what_the_task_asks(corpus, tokenizer):
    """Prompts are those of GRPO, no held-out question is taught, and about 45% of the completions are right."""
    examples = texts(corpus, tokenizer)
    assert [prompt for prompt, _ in examples].count(examples[-1][0]) == 4 and "How far?" in examples[-1][0]
    answers = {}
    for level in learning_teach.LEVELS:
        for row in learning_task.problems("train", 200, learning_teach.FIRST_SEED, level):
            prompt = learning_task.task.prompt(row)
            answers[tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)] = row
    taught = [(answers[prompt], completion) for prompt, completion in examples[:-4]]
    assert {split_of(row["question"]) for row, _ in taught} == {"train"}
    assert all(completion.endswith("<|im_end|>") for _, completion in examples)
    right = [correctness(completion.removesuffix("<|im_end|>"), row["answer"]) == 2.0 for row, completion in taught]
    assert 0.35 < sum(right) / len(right) < 0.55


def test_a_shard_is_a_pure_function_of_its_arguments():
    shards = [learning_teach.make_shard(number, 20, "", 1, seed) for number, seed in ((3, 0), (3, 0), (4, 0), (3, 1))]
    same = [all((a == b).all() for a, b in zip(shards[0], other, strict=True)) for other in shards[1:2]]
    assert same == [True]
    assert all(shards[0][0].tolist() != other[0].tolist() for other in shards[2:])


def test_a_slip_changes_the_last_result_and_the_answer():
    row = {"solution": "He has 900 + 180 = 1,080 miles.\nSo that is 1,080 - 80 = 1,000", "answer": "1,000"}
    notes = notes_of_word_problem(row, Random(0))
    assert correctness(careful(notes), row["answer"]) == 2.0 and correctness(slipping(notes), row["answer"]) == 0.0
    assert notes.slip == row["solution"].removesuffix("1,000") + notes.wrong


@pytest.mark.parametrize("size", [100, 1000, 4096])
def test_an_epoch_shows_every_example_once_and_fits(corpus, size):
    pad, shown = 7, Counter()
    for tokens, labels in learning_teach.batches(corpus, size, pad, "cpu", seed=1):
        assert tokens.shape == labels.shape and (tokens.numel() <= size or len(tokens) == 1)
        for row, marks in zip(tokens.tolist(), labels.tolist(), strict=True):
            learned = [place for place, mark in enumerate(marks) if mark != IGNORED]
            start, end = learned[0], learned[-1] + 1
            assert set(row[end:]) <= {pad} and marks[start:end] == row[start:end]
            shown[(start, *row[:end])] += 1
        if shown.total() >= len(corpus.lengths):
            break
    examples = zip(corpus.tokens.split(corpus.lengths.tolist()), corpus.num_prompt.tolist(), strict=True)
    assert shown == Counter((num_prompt, *tokens.tolist()) for tokens, num_prompt in examples)


def test_batches_of_about_one_length_hardly_pad(corpus):
    real = shown = 0
    for tokens, labels in learning_teach.batches(corpus, 2048, pad=0, device="cpu", seed=0):
        shown += tokens.numel()
        real += int((labels != IGNORED).sum())
        if real >= int((corpus.lengths - corpus.num_prompt).sum()):
            break
    assert int(corpus.lengths.sum()) / shown > 0.93


def test_the_rate_follows_the_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(learning_teach.time, "perf_counter", lambda: now[0])
    factor = learning_teach.on_time(60)
    assert factor(0) == 1 / learning_teach.WARM_UP
    now[0] += 30
    assert factor(1000) == pytest.approx(0.5)
    now[0] += 20
    assert factor(2000) == pytest.approx((1 + math.cos(math.pi * 50 / 60)) / 2)
    now[0] += 10
    assert factor(3000) is None


def test_the_task_asks_both_levels_and_its_gold_answers_are_right():
    for split in ("train", "test"):
        rows = learning_task.rows(split, "embedded", count=40)
        assert len(rows) == 40 and {split_of(row["question"]) for row in rows} == {split}
        assert all(correctness(learning_task.task.gold_text(row), row["answer"]) == 2.0 for row in rows)
        half = [max(int(n) for n in row["answer"].split()) for row in rows]
        assert max(half[1::2]) > max(half[::2])


def scores(value):
    return {f"eval/{k}{end}": value + d for k in ("pass@1", "pass@4", "pass@8") for end, d in
            (("", 0.0), ("/low", -0.05), ("/high", 0.05))}  # fmt: skip


@pytest.fixture
def work(tmp_path):
    """A folder as the stages leave it: a start model of 30%, one run that ends at 80%."""
    start = {"machine": {"gpu": "TestGPU 1", "date": "2026-01-01"}, "parameters": 64_000_000, "tokens": 10**8,
             "seconds": 240.0, "loss": 0.5, "scores": {"word problems": scores(0.3)}}  # fmt: skip
    (tmp_path / "teach.json").write_text(json.dumps(start))
    (tmp_path / "grpo-nf4.json").write_text(
        json.dumps({"seconds": 200.04, "calls": 1, "finished": True, "engine": "vllm"})
    )
    folder = tmp_path / "grpo-nf4"
    (folder / "checkpoints" / "step-000030").mkdir(parents=True)
    config = dict(vars(Config()), steps=30, model="/somewhere", run_dir="/elsewhere")
    (folder / "config.json").write_text(json.dumps({"config": config, "origins": {}}))
    lines = [{"step": 0, **scores(0.31)}]
    for step in range(30):
        names = ("mismatch/gap", "sync/gap", "completion/length", "policy/entropy", "time/rollout", "time/score",
                 "time/update", "time/sync")  # fmt: skip
        lines.append({
            "step": step, **dict.fromkeys(names, 0.25), "reward/mean": step / 10,
            "mismatch/kl": None if step == 3 else 1e-4, "time/step": 9.0 if step == 0 else 1.0,
            "speed/tokens_per_second": 100.0, "speed/rollout_tokens_per_second": 12345.6, "memory/peak_gib": step / 2,
        })  # fmt: skip
    lines.append({"step": 30, **scores(0.8)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_report_says_what_the_run_held(work):
    result = learning_report.result_of(work, ["nf4", "bf16"])
    learning_report.write(result, work / "learning-testgpu-1.json")
    read = json.loads((work / "learning-testgpu-1.json").read_text())
    [run] = read["runs"]
    assert read["start"]["scores"]["word problems"]["pass@8"] == [0.3, 0.25, 0.35]
    assert [point["pass@1"] for point in run["held_out"]] == [[0.31, 0.26, 0.36], [0.8, 0.75, 0.85]]
    assert run["config"] == {"steps": 30}
    assert run["curves"]["reward"] == [step / 10 for step in range(30)] and run["curves"]["kl"][3] is None
    assert run["stage_seconds"]["step"] == 1.0 and run["first_step_seconds"] == 9.0 and run["peak_gib"] == 14.5
    assert any("31.0% [26.0, 36.0] before, 80.0% [75.0, 85.0] after step 30" in line
               for line in learning_report.summary(read))  # fmt: skip
    table = learning(work)
    assert "| nf4 | vllm | 31.0% [26.0, 36.0] | 80.0% [75.0, 85.0] | +49.0 | 30 | 1.00 |" in table
    assert "12,346 | 1.0e-04 | 14.5 |" in table and "TestGPU 1" in table


def test_the_figure_is_small_and_shows_something(work):
    learning_report.draw(learning_report.result_of(work, ["nf4"]), work / "learning.png")
    assert (work / "learning.png").stat().st_size < 200_000
    with Image.open(work / "learning.png") as image:
        assert image.width > 1000 and len(set(image.convert("L").getdata())) > 20
