"""The first stage of benchmarks/learning.py: a class of students, and a model that learns from scratch to imitate it.
Knows nothing of GRPO. The class is that of the embedded model (scripts/half_teaching.py), its problems are harder.

Words here: a shard is a share of the demonstrations, a corpus all of them in tokens (N tokens, E examples).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import learning_task
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer

from grpo.build import build_engine, build_evaluator, build_policy
from grpo.embedded import MODEL_DIR
from grpo.questions import build_questions
from grpo.rollout.vllm_compat import is_installed
from grpo.task import Row, Task

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from half_teaching import (
    IGNORED,
    Example,
    Student,
    build_model,
    careful,
    chatty,
    encode,
    guessing,
    notes_of_word_problem,
    save,
    slipping,
    squeezed,
    train,
    unfinished,
    untagged,
)

# Sizes that blocks of 64 divide: 4-bit weights are quantised in such blocks.
SHAPES: dict[str, dict[str, Any]] = {
    "64m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 10,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 2048,
    },
    "2m": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
    },
}

# 45% of what the class writes is right, so a model that learns it well enough to calculate two times in three starts at
# 30%. More slips in the calculation than the embedded model saw: working that looks right must not be enough.
STUDENTS: dict[Student, float] = {
    careful: 0.40,
    squeezed: 0.05,
    chatty: 0.22,
    untagged: 0.10,
    unfinished: 0.05,
    guessing: 0.08,
    slipping: 0.10,
}
LEVELS = {1: 0.2, 2: 0.4, 3: 0.4}  # shares of the word problems that are taught
SHARDS = 64  # of the demonstrations, whatever the number of cores, so that the data are the same everywhere
FIRST_SEED = 1000  # of the taught problems; the task's own have seed 0

POOL = 2**15  # examples sorted by length together
WARM_UP = 100  # optimizer steps
GOAL = (0.15, 0.50)  # pass@1 of the start model: GRPO finds right answers to reward, and has something to teach


def teach(arguments: argparse.Namespace) -> None:
    """Write the half-taught model to `model` in --work, and what it is and scores to `teach.json`."""
    folder, record = arguments.work / "model", arguments.work / "teach.json"
    if record.exists() and not arguments.again:
        print(f"{folder} is there; --again teaches a new one")
        return
    started = time.perf_counter()
    # Before CUDA is touched: its state does not survive the fork into the processes that make the data.
    corpus = make_corpus(arguments.problems, arguments.data, arguments.demonstrations, arguments.seed)
    making = time.perf_counter() - started
    print(f"{len(corpus.lengths):,} examples, {len(corpus.tokens):,} tokens, made in {making:.0f} s", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, padding_side="left")
    torch.manual_seed(arguments.seed)
    model = build_model(tokenizer, SHAPES[arguments.size]).to(device)
    parameters = model.num_parameters()
    print(f"{parameters:,} parameters on {device}", flush=True)
    if arguments.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    shuffled = batches(corpus, arguments.tokens, tokenizer.pad_token_id, device, arguments.seed)
    trained = train(model, shuffled, on_time(60 * arguments.minutes), arguments.learning_rate, report_every=50)
    save(model, tokenizer, folder)
    del model, shuffled
    gc.collect()
    torch.cuda.empty_cache()
    scores = {"word problems": held_out(learning_task.task, folder, arguments.prompts)}
    if device == "cuda" and is_installed():
        # The engine of the runs to come, so that their first score can be compared with one of as many samples.
        scores["word problems, vLLM"] = held_out(learning_task.task, folder, arguments.prompts, engine="vllm")
    if arguments.data:
        long_answers = {"data": arguments.data, "max_completion_tokens": 320}
        scores["gsm8k"] = held_out(learning_task.gsm8k, folder, arguments.prompts // 2, **long_answers)
    say_scores(scores)
    content = {
        "machine": machine(),
        "parameters": parameters,
        "shape": SHAPES[arguments.size],
        "examples": len(corpus.lengths),
        "gsm8k": bool(arguments.data),
        "seconds_of_making_data": round(making, 1),
        **dataclasses.asdict(trained),
        "scores": scores,
    }
    record.write_text(json.dumps(content, indent=1))


@dataclass(frozen=True)
class Corpus:
    """Examples one after the other, without padding."""

    tokens: Tensor  # [N] int16
    lengths: Tensor  # [E] int64, tokens of each example
    num_prompt: Tensor  # [E] int64, how many of them are the prompt


Arrays = tuple[NDArray[np.int16], NDArray[np.int64], NDArray[np.int64]]  # the fields of a Corpus


def make_corpus(problems: int, data: str, demonstrations: int, seed: int) -> Corpus:
    """The demonstrations of a class, made by all cores."""
    make = partial(make_shard, problems=problems // SHARDS, data=data, demonstrations=demonstrations, seed=seed)
    # The processes share the cores, so the tokenizer of each has one.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("fork").Pool(min(SHARDS, os.cpu_count() or 1)) as pool:
        shards = pool.map(make, range(SHARDS), chunksize=1)
    return Corpus(*(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*shards, strict=True)))


def make_shard(shard: int, problems: int, data: str, demonstrations: int, seed: int) -> Arrays:
    """A share of the demonstrations, as a pure function of its arguments and the data's files."""
    random = Random(f"{seed} {shard}")
    rows = shard_rows(shard, problems, data, demonstrations, seed)
    students = random.choices(list(STUDENTS), list(STUDENTS.values()), k=len(rows))
    examples = [
        Example(learning_task.task.prompt(row), student(notes_of_word_problem(row, random)))
        for row, student in zip(rows, students, strict=True)
    ]
    encoded = encode(examples, AutoTokenizer.from_pretrained(MODEL_DIR))
    return (
        torch.cat([example.tokens for example in encoded]).numpy().astype(np.int16),
        np.array([len(example.tokens) for example in encoded]),
        np.array([example.num_prompt for example in encoded]),
    )


def shard_rows(shard: int, problems: int, data: str, demonstrations: int, seed: int) -> list[Row]:
    """The word problems of a shard and its share of the data's training rows, each of these as often as it is shown."""
    first = FIRST_SEED + SHARDS * seed
    rows = [
        row
        for level, share in LEVELS.items()
        for row in learning_task.problems("train", round(problems * share), seed=first + shard, level=level)
    ]
    if data:
        rows += list(learning_task.gsm8k.rows("train", data))[shard::SHARDS] * demonstrations
    return rows


def batches(corpus: Corpus, size: int, pad: int, device: str, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels, each [examples, longest], of at most `size` tokens: examples of about one length together.

    The corpus lies on the device, so that a batch costs one index.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = corpus.tokens.to(device)
    facts = torch.stack([corpus.lengths.cumsum(0) - corpus.lengths, corpus.lengths, corpus.num_prompt], 1).to(device)
    while True:
        for pool in torch.randperm(len(corpus.lengths), generator=generator).split(POOL):
            parts = cut_by_length(pool, corpus.lengths, size)
            for part in torch.randperm(len(parts), generator=generator).tolist():
                longest = int(corpus.lengths[parts[part]].max())
                yield lay_out(flat, facts[parts[part].to(device)], longest, pad)


def cut_by_length(pool: Tensor, lengths: Tensor, size: int) -> list[Tensor]:
    """Indices of examples [n], longest first, in parts that fit `size` tokens when padded."""
    pool = pool[lengths[pool].argsort(descending=True)]
    sorted_lengths = lengths[pool].tolist()
    parts, start = [], 0
    while start < len(pool):
        count = max(1, size // sorted_lengths[start])
        parts.append(pool[start : start + count])
        start += count
    return parts


def lay_out(flat: Tensor, facts: Tensor, longest: int, pad: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [examples, longest]; facts [examples, 3]: start in `flat`, length, length of the prompt."""
    start, length, num_prompt = facts[:, :, None].unbind(1)
    place = torch.arange(longest, device=flat.device)
    tokens = torch.where(place < length, flat[(start + place).clamp(max=len(flat) - 1)], pad).long()
    return tokens, torch.where((place >= num_prompt) & (place < length), tokens, IGNORED)


def on_time(seconds: float) -> Callable[[int], float | None]:
    """Warm-up, then a cosine to zero that follows the clock, which starts with the first step."""
    started: list[float] = []

    def factor(step: int) -> float | None:
        now = time.perf_counter()
        started[:] = started or [now]
        share = (now - started[0]) / seconds
        return min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * share)) if share < 1 else None

    return factor


def held_out(task: Task, folder: Path, prompts: int, **changes: Any) -> dict[str, float]:
    """pass@1 and pass@8 of the model in `folder`, as the product measures them."""
    settings = {"engine": "torch", "eval_prompts": prompts, "eval_samples": 8, "eval_k": 8} | changes
    config = dataclasses.replace(task.config, model=str(folder), base="bf16", **settings)
    questions = build_questions(task, config)
    policy = build_policy(config, questions.tokenizer, questions.longest_sequence)
    engine = build_engine(config, policy, questions.tokenizer, questions.canary_prompts, questions.longest_sequence)
    try:
        return build_evaluator(task, config, questions)(engine)
    finally:
        engine.close()


def say_scores(scores: dict[str, dict[str, float]]) -> None:
    for name, score in scores.items():
        for k in ("pass@1", "pass@8"):
            middle, low, high = (score[f"eval/{k}{end}"] for end in ("", "/low", "/high"))
            print(f"start model, {name}, held out: {k} {middle:.1%} (95%: {low:.1%} to {high:.1%})", flush=True)
    start = scores["word problems"]["eval/pass@1"]
    if not GOAL[0] <= start <= GOAL[1]:
        print(f"note: {start:.1%} is outside {GOAL[0]:.0%} to {GOAL[1]:.0%}; change --minutes or the class (STUDENTS)")


def machine() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else f"none, {os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
