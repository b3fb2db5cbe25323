"""A run's folder of made-up steps, with whatever texts: what the tests of reports share. No test is here."""

import json
import math
import random

import torch
from recorded import metrics_of

from grpo.config import Config
from grpo.folder import Saved, write_config
from grpo.record.files import Files
from grpo.record.starts import write_start
from grpo.types import Completion, Group, Prompt

# What a model, a data set or whoever made them may have written.
HOSTILE = [
    "<script>window.hacked = 1; alert(1)</script>",
    "</style></script><script>window.hacked = 2</script>",
    '<img src=x onerror="window.hacked = 3"><svg onload=alert(1)>',
    '"><a href="javascript:window.hacked=4" onclick="window.hacked=5">click</a>',
    "' onmouseover='window.hacked=6",
    "<iframe srcdoc='<script>parent.hacked=7</script>'></iframe><base href='https://example.org/'>",
    "{{ 7 * 7 }} {% raw %} ${alert(1)} <!-- --> ]]> &lt;b&gt;",
    "\u202eright to left\u202c \u2066isolated\u2069 \x1b[31mred\x1b[0m \x00 \ud800 \u2028",
    "<meta http-equiv=refresh content='0;url=//a.org'><form action=//a.org><input autofocus onfocus=alert(1)>",
    "שלום עולם and مرحبا",
]


def prompts_of(texts, split="train"):
    return [
        Prompt(row, f"{split} question {row} {text}", [1], {"answer": text}, [{"role": "user", "content": text}])
        for row, text in enumerate(texts)
    ]


def group_of(prompt, texts, right, name="correctness", cut=False, advantages=True):
    """Right answers earn 2 and 0.5, wrong ones 0.5 for their form."""
    completions = [
        Completion([5] * (3 + len(text) % 7), [-0.1], text, "length" if cut else "stop", 0, seed=member)
        for member, text in enumerate(texts)
    ]
    parts = {name: torch.tensor([2.0 * each for each in right]), "form": torch.tensor([0.5] * len(texts))}
    rewards = sum(parts.values())
    advantages = rewards - rewards.mean() if advantages else torch.empty(0)
    return Group(prompt, completions, parts=parts, rewards=rewards, advantages=advantages)


def make_run(folder, steps=12, texts=("a plain answer", "another answer"), evaluate_every=5, groups=4, better=True,
             name="toy", tokens=True, size=4, reward="correctness"):  # fmt: skip
    """Held-out prompts are right in a share of the samples that grows with the steps where `better`."""
    folder.mkdir(parents=True)
    write_config(Saved(folder, "id", f"/somewhere/{name}.py", "0", name, Config(steps=steps), {"steps": "flag"}))
    write_start(
        folder,
        {
            "command": f"python -m grpo.run {name}.py", "step": 0, "steps": steps, "task": name, "model": texts[0],
            "device": "cpu", "memory_gib": 80.0, "engine": "made up", "rewards": {reward: 1.0, "form": 1.0},
            "solved": [reward, 2.0], "threads": 1,
        },
    )  # fmt: skip
    files, dice = Files(folder, None, gold=lambda prompt: prompt.fields["answer"]), random.Random(0)
    asked, held_out = prompts_of(texts * 9), prompts_of(texts * 9, "held-out")
    for step in range(steps + 1):
        if step % evaluate_every == 0 or step == steps:
            chance = 0.2 + 0.7 * step / steps if better else 0.5
            answers = [
                group_of(prompt, [f"{text} {step}" for text in texts[:2]], [dice.random() < chance for _ in texts[:2]],
                         reward, advantages=False)
                for prompt in held_out
            ]  # fmt: skip
            mean = sum(float(group.parts[reward].mean()) / 2 for group in answers) / len(answers)
            ends = {"eval/pass@1/low": mean - 0.1, "eval/pass@1/high": mean + 0.1, "eval/truncated": 0.0}
            files.evaluation(step, {"eval/pass@1": mean, "eval/pass@4": mean, **ends}, answers)
        if step < steps:
            files.step(step, metrics_of(step) | {f"reward/{reward}": 1.0, "time/rollout": 1.0, "time/update": 2.0,
                                                 "time/step": 3.5})  # fmt: skip
            made = []
            for number in range(groups):
                right = [[True, False], [True], [False], [False, True]][number % 4]
                said = [texts[(step + number + member) % len(texts)] for member in range(size)]
                paid = [right[member % len(right)] for member in range(size)]
                made.append(group_of(asked[(step + number) % len(asked)], said, paid, reward, cut=number % 4 == 2))
            files.completions(step, made, _traces(step, made) if tokens else [])
    files.close()
    return folder


def _traces(step, groups):
    records = []
    for member, completion in enumerate(groups[0].completions):
        words = completion.text.split(" ")
        columns = {name: [math.sin(step + place) for place in range(len(words))] for name in ("gap", "weight")}
        more = {"logprob": [-0.5] * len(words), "entropy": [0.7] * len(words)}
        records.append({"group": 0, "member": member, "texts": [word + " " for word in words], **columns, **more})
    return records


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
