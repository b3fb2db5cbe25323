"""Numbers, scores and groups of made-up steps: what the tests of records share. No test is here."""

import math

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo.types import Completion, Group, Prompt

NAMES = ["correctness", "integer", "strict_xml", "soft_xml", "xml_count"]


def metrics_of(step):
    return {
        "reward/mean": 0.1 + step / 3,
        "reward/std": 0.5,
        **{f"reward/{name}": step / 7 for name in NAMES},
        "completion/length": 100.0 + step,
        "completion/truncated": 0.25,
        "groups/zero_variance": 0.125,
        "policy/entropy": 1.0 / (1 + step),
        "policy/loss": -1e-3,
        "mismatch/kl": 2e-5 * (step + 1),
        "optim/grad_norm": math.inf if step == 2 else 0.5,
        "optim/learning_rate": 1e-5,
        "speed/tokens_per_second": 12345.6,
        "memory/peak_gib": 12.34,
    }


def scores_of(step):
    return {"eval/pass@1": 0.3 + step / 100, "eval/pass@1/low": 0.25, "eval/pass@1/high": 0.35, "eval/pass@4": 0.5}


def group_of(step, text="<answer>\n5\n</answer>", prompt=None):
    completions = [Completion([1, 2, 3], [-0.1] * 3, text, "stop", step), Completion([1], [-0.1], "5", "length", step)]
    return Group(
        prompt or Prompt(7, "What is 2 + 3?", [1], {"answer": "5"}),
        completions,
        parts={"correctness": torch.tensor([2.0, math.nan])},
        rewards=torch.tensor([2.0, 0.0]),
        advantages=torch.tensor([0.1, -0.1]),
    )


def held_out_of(step):
    group = group_of(step, prompt=Prompt(3, "What is 1 + 1?", [1], {"answer": "2"}))
    group.advantages = torch.empty(0)
    return group


def record_steps(recorder, start, stop, evaluate_every=3):
    for step in range(start, stop):
        if step % evaluate_every == 0:
            recorder.evaluation(step, scores_of(step), [held_out_of(step)])
        recorder.completions(step, [group_of(step)])
        recorder.step(step, metrics_of(step))


def scalars(folder, name):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]
