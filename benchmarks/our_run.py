"""A run of ours as a user has it, over random weights: the loop, the engine and the metrics are the product's own.

Knows nothing of what is compared. Three things are arranged: prompts have an exact length, rewards are random, and no
token ends a completion, so that each step is the same work. No held-out score is made, for peers make none.
"""

from __future__ import annotations

import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from profiling import profile
from random_models import questions
from work import RANK, random_rewards, timed, torch_peaks

from grpo.build import build_run
from grpo.config import Config
from grpo.policy import load_tokenizer
from grpo.questions import build_questions
from grpo.rollout import Engine
from grpo.rollout.audit import Audit
from grpo.rollout.engine import Finished, nobody
from grpo.rollout.torch_engine import TorchEngine
from grpo.rollouts import Rollouts
from grpo.task import Task
from grpo.train import Run, train
from grpo.types import Completion, Request
from grpo.world import ALONE, World

# Of the plan that a run tells.
FORETOLD = re.compile(r"at most ([\d.]+) in a rollout, ([\d.]+) in an update")


def at_random(completions: list[str]) -> list[float]:
    """A reward that teaches nothing and gives every group something to learn from."""
    return random_rewards(completions)


def our_config(model: Path, base: str, device: str, **more: Any) -> Config:
    """What the product would be started with. Completions are all cut off by the token limit, and trained on."""
    settings = dict(
        model=str(model), base=base, device=device, lora_rank=RANK, lora_alpha=float(RANK), mask_truncated=False,
        learning_rate=1e-5, eval_prompts=8, eval_samples=1, eval_k=1, eval_every=0, save_every=10**9,
    )  # fmt: skip
    return Config(**(settings | more))


def measure(
    config: Config,
    prompt_tokens: int,
    started: float,
    until: float | None,
    sampled: int | None = None,
    profiled: bool = False,
) -> dict[str, Any]:
    """Train config.steps steps, and say what they took.

    started, until: time.time() when the process began, and after which no further step is begun. sampled: tokens of a
    completion that are really sampled, where the rest is made up (see Lengthened). profiled: print where the time of
    two more steps goes, first Python's, then the GPU's.
    """
    start = {"imported": time.time() - started}
    notes: list[str] = []

    def note(told: str) -> None:
        notes.append(told)
        print(told, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        run = build(config, prompt_tokens, Path(folder), note)
        start["built"] = time.time() - started
        built_gib = device_used_gib()
        if sampled is not None:
            rolling = cast(Rollouts, run.source).roll_out
            run.engine = rolling.engine = Lengthened(run.engine, sampled, run.policy.model.head.shape[0])
            rolling.audit = Deaf(run.policy, rolling.audit.noise)
        watch = Watch(run, until)
        with run.recorder:
            train(run)
            record = watch.record() | foretold(notes) | what_ran(run)
            if profiled:
                profile(lambda: one_more_step(run), steps=1)
    start["first step"] = watch.first - started
    told = {stage: round(seconds, 1) for stage, seconds in start.items()}
    return record | {"start_s": told["first step"], "start_stages_s": told, "built_gib": built_gib}


def one_more_step(run: Run) -> None:
    """Neither a held-out score nor a checkpoint follows it."""
    run.config = replace(run.config, steps=run.progress.step + 2)
    run.stop_requested = True
    train(run)


def build(config: Config, prompt_tokens: int, folder: Path, note: Callable[[str], object], world: World = ALONE) -> Run:
    """The product's own, over a task whose chats are `prompt_tokens` long; `note` is told what it says at its start."""
    count = config.prompts_per_step * config.steps
    texts = questions(load_tokenizer(config.model), count + config.eval_prompts, prompt_tokens, config.seed)

    def rows(split: str, data: str) -> Iterator[dict[str, str]]:
        for text in texts[:count] if split == "train" else texts[count:]:
            yield {"question": text}

    task = Task(
        name="benchmark",
        rows=rows,
        prompt=lambda row: [{"role": "user", "content": row["question"]}],
        rewards={at_random: 1.0},
        gold=None,
        solved=None,
        data="made up",
        config=config,
    )
    run = build_run(task, config, folder, build_questions(task, config, note=note), None, note, world=world)
    run.policy.stop_tokens.clear()
    if isinstance(run.engine, TorchEngine):  # it has taken them over
        run.engine.stop_tokens.clear()
    run.progress.evaluated = config.steps
    return run


class Watch:
    """Stands between the loop and its recorder: sees the metrics of each step, and the clock."""

    def __init__(self, run: Run, until: float | None):
        self.run, self.until = run, until
        self.steps: list[dict[str, float]] = []
        self.first = 0.0  # time.time() after the first step
        self.record_step = run.recorder.step
        run.recorder.step = self

    def __call__(self, step: int, metrics: Any) -> None:
        """See Recorder.step."""
        self.record_step(step, metrics)
        self.first = self.first or time.time()
        self.steps.append(dict(metrics))
        if self.until is not None and time.time() > self.until:
            self.run.stop_requested = True

    def record(self) -> dict[str, Any]:
        """Medians of the timed steps, seconds; the most memory that torch held in this process."""
        counted = timed(self.steps)

        def median(name: str) -> float:
            return statistics.median(step[f"time/{name}"] for step in counted)

        stages = {name: median(name) for name in ("rollout", "update", "sync")}
        other = statistics.median(s["time/step"] - sum(s[f"time/{name}"] for name in stages) for s in counted)
        seconds = {"step": median("step"), **stages, "old_logp": 0.0, "other": other}
        return {
            **{f"{name}_s": round(value, 4) for name, value in seconds.items()},
            "all_steps_s": [round(step["time/step"], 3) for step in self.steps],
            "timed_steps": len(counted),
            "completion_tokens": counted[-1]["completion/length"],
            "gap": counted[-1]["mismatch/gap"],
            "process_peak_gib": round(counted[-1]["memory/peak_gib"], 2),
            **torch_peaks(torch.cuda.is_available()),
        }


def foretold(notes: list[str]) -> dict[str, Any]:
    """The memory plan as the run told it at its start, and the peak of the whole GPU that it foretells, in GiB; nothing
    on a CPU, where there is none."""
    plans = [(note, peaks) for note in notes if (peaks := FORETOLD.search(note))]
    if not plans:
        return {"predicted_gib": None}
    plan, peaks = plans[-1]
    return {"predicted_gib": max(map(float, peaks.groups())), "plan": plan.splitlines()}


def device_used_gib() -> float | None:
    """What the GPU has given out to all processes by now."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return round((total - free) / 2**30, 2)


def what_ran(run: Run) -> dict[str, Any]:
    """Precision, batches and engine, from the objects that ran."""
    config, engine = run.config, run.engine
    shown = engine.engine if isinstance(engine, Lengthened) else engine
    return {
        "ran": {
            "base": config.base,
            "engine": type(shown).__name__,
            "model": type(run.policy.model).__name__,
            "recompute": config.recompute,
            "tokens_per_batch": config.tokens_per_batch,
            "correction": config.correction,
            "old_logp_pass": False,  # the ratio's denominator comes from the pass that is trained
            "optimizer": type(run.policy.optimizer).__name__,
        }
    }


# ---- contexts too long to be sampled each time


class Lengthened:
    """An engine whose completions go on, behind what it has sampled, with tokens at random.

    Memory does not ask where tokens come from: the engine holds its whole KV cache from the start, and the update
    reads completions of full length.
    """

    def __init__(self, engine: Engine, sampled: int, vocabulary: int):
        self.engine, self.sampled, self.vocabulary = engine, sampled, vocabulary

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def sample(self, requests: list[Request], finished: Finished = nobody) -> list[Completion]:
        """See Engine.sample."""
        short = self.engine.sample([replace(r, max_tokens=min(r.max_tokens, self.sampled)) for r in requests])
        for request, completion in zip(requests, short, strict=True):
            draw, missing = random.Random(request.seed), request.max_tokens - len(completion.tokens)
            typical = statistics.mean(completion.sampler_logprobs)
            completion.tokens += [draw.randrange(10, self.vocabulary - 10) for _ in range(missing)]
            completion.sampler_logprobs += [typical] * missing
        for index, completion in enumerate(short):
            finished(index, completion)
        return short


class Deaf(Audit):
    """Reads what the audit reads, and lets it pass: what was made up is not drawn from the policy."""

    def check_gap(self, gap: float) -> None:
        """See Audit.check_gap."""

    def _check_ranks(self) -> None:
        """See Audit._check_ranks."""
