"""Does the canary stay silent over honest runs in low precision, and how soon does it find a stale engine?

    python benchmarks/canary.py            all cases; writes benchmarks/results/canary-<gpu>.json
    python benchmarks/canary.py --only llama-3.1-8b/nf4 --steps 200 --more 0 --tokens 16 --prompts 4
    python benchmarks/canary.py --only tiny/nf4 --device cpu --steps 3 --more 40 --tokens 12      tries the script

A case is a shape, with random weights, and how its base is kept. The product's own policy and engine do whole steps on
random rewards: the engine samples, an update, a sync; --steps at each of --rates, one rate after the other on the same
adapter. Then the engine is made stale for up to --more steps: the canary is answered with the engine's own measurements
of the last honest version, one of several each time, so that their noise is real, while the policy goes on moving.
Then vLLM draws tokens wrongly: greedily, and from the 20 likeliest, with the log-probabilities that it gives for them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
from our_settings import add_settings, fields_of, settings_of
from shapes import SHAPES, model_folder
from work import GROUP, PROMPT_TOKENS, PROMPTS

BASES = ("nf4", "bf16")
USUAL = [f"{shape}/{base}" for shape in ("llama-3.1-8b", "qwen3-1.7b") for base in BASES]
KNOWN = [f"{shape}/{base}" for shape in SHAPES for base in BASES]
REPLAYS = 8  # measurements of the last honest version
DRAWN = 20  # steps to find wrong draws in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_arguments(parser, example="llama-3.1-8b/nf4")
    parser.add_argument("--steps", type=int, default=40, help="honest ones, at each rate")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4], help="learning rates of these")
    parser.add_argument("--more", type=int, default=40, help="steps to find a stale engine in; 0: not tried")
    parser.add_argument("--stale-rate", type=float, default=1e-4, help="learning rate while the engine is stale")
    parser.add_argument("--tokens", type=int, default=128, help="of a completion")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of a step")
    add_settings(parser)
    arguments = parser.parse_args()
    if arguments.case:
        cases.answer(work(arguments), lambda: measure(arguments))
    if min(arguments.steps, arguments.tokens, arguments.prompts) < 1 or arguments.more < 0:
        parser.error("--steps, --tokens and --prompts must be 1 or more, and --more 0 or more.")
    names = cases.chosen(parser, arguments.only, USUAL, KNOWN)
    shown = [word for name, value in work(arguments).items() for word in (f"--{name.replace('_', '-')}", *told(value))]
    device = cases.device_name(arguments.device)
    about = {"command": "python benchmarks/canary.py", "device": device, "group_size": GROUP}
    about |= {"prompt_tokens": PROMPT_TOKENS}
    results = cases.Results(cases.results_path(arguments.out, "canary", device), about)
    shown += settings_of(parser, arguments)
    sys.exit(cases.Benchmark(arguments, results, lambda case: (case.split("/")[0], False), in_a_line, shown).run(names))


def told(value: Any) -> list[str]:
    """As words of a command line."""
    return [f"{each:g}" for each in (value if isinstance(value, list) else [value])]


def work(arguments: argparse.Namespace) -> cases.Record:
    """What a case is."""
    return {name: getattr(arguments, name) for name in ("steps", "rates", "more", "stale_rate", "tokens", "prompts")}


def measure(arguments: argparse.Namespace) -> cases.Record:
    """One engine: honest steps, a stale engine, wrong draws."""
    import our_run

    shape, base = arguments.case.split("/")
    config = our_run.our_config(
        model_folder(shape, False, arguments.folder), base, arguments.device, prompts_per_step=arguments.prompts,
        group_size=GROUP, max_completion_tokens=arguments.tokens, **fields_of(arguments.set),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = our_run.build(config, PROMPT_TOKENS, Path(folder), lambda sentence: print(sentence, flush=True))
        tried = Tried(run, arguments)
        honest = [tried.honest(rate, arguments.steps) for rate in arguments.rates]
        record: cases.Record = {
            "noise": float(f"{run.engine.canary.noise:.3g}"),
            "canary_tokens": len(run.engine.canary.last.engine),
            "honest": honest,
        }
        if arguments.more and tried.in_time():
            record["stale"] = tried.until_found(tried.stale(arguments.more, arguments.stale_rate))
        if hasattr(run.engine, "_params") and tried.in_time():
            record["greedy"] = tried.until_found(tried.wrong_draws(temperature=0.0))
            record["top 20"] = tried.until_found(tried.wrong_draws(top_k=20))
    return record


class Tried:
    """A run's policy and engine, and what is done with them. Steps are counted over all of it."""

    def __init__(self, run: Any, arguments: argparse.Namespace):
        from grpo.loss import build_loss
        from grpo.packing import build_packer
        from grpo.rollout.audit import Audit

        self.policy, self.engine, self.config = run.policy, run.engine, run.config
        self.vocabulary, self.until = run.policy.model.head.shape[0], arguments.until
        self.number, self.prompts = 0, arguments.prompts
        self.loss, self.pack = build_loss(self.config), build_packer(self.config, self.policy.device)
        self.audit = Audit(self.policy, self.engine.canary.noise)

    def in_time(self) -> bool:
        """No step is begun behind the deadline."""
        return self.until is None or time.time() < self.until

    def honest(self, rate: float, steps: int) -> cases.Record:
        """So many steps as the product does them, or as many as there is time for, or until a sentence ends them."""
        done: list[dict[str, float]] = []
        sentence = ""
        while len(done) < steps and self.in_time() and not sentence:
            sentence = self.sentence_of(lambda: done.append(self.step(rate)))
        medians = {name: statistics.median(one[name] for one in done) for name in ("step_s", "sync_s", "audit_s")}
        return {
            "rate": rate,
            "steps": len(done),
            "alarm": sentence,
            "largest_gap": round(max(one["sync/gap"] for one in done), 4),
            "mean_rank": round(statistics.mean(one["mismatch/rank"] for one in done), 4),
            "most_unproved": max(one["sync/unproved"] for one in done),
            "last_unproved": done[-1]["sync/unproved"],
            **{name: round(value, 4) for name, value in medians.items()},
        } if done else {"rate": rate, "steps": 0, "alarm": sentence}  # fmt: skip

    def step(self, rate: float) -> dict[str, float]:
        """One step of the product, with random rewards."""
        from rollout import synchronize

        start = time.perf_counter()
        groups = self.sampled()
        before_audit = time.perf_counter()
        measured = self.audit(groups, self.number)
        audit_s = time.perf_counter() - before_audit
        self.reward(groups)
        self.engine.release()
        measured |= self.policy.update(self.pack(groups), self.loss, rate)
        self.audit.check_gap(measured["mismatch/gap"])
        synchronize()
        before_sync = time.perf_counter()
        measured |= self.engine.sync()
        now = time.perf_counter()
        return measured | {"audit_s": audit_s, "sync_s": now - before_sync, "step_s": now - start}

    def sampled(self, group_size: int = GROUP, prompts: int | None = None) -> list[Any]:
        """Groups after prompts of random tokens, others at each call."""
        import torch

        from grpo.rollout.sampling import sample_groups
        from grpo.types import Prompt

        self.number += 1
        size = (prompts or self.prompts, PROMPT_TOKENS)
        rows = torch.randint(10, self.vocabulary - 10, size, generator=torch.Generator().manual_seed(self.number))
        asked = [Prompt(index, "", tokens, {}) for index, tokens in enumerate(rows.tolist())]
        return sample_groups(self.engine, asked, group_size, self.config.max_completion_tokens, seed=self.number)

    def reward(self, groups: list[Any]) -> None:
        """At random."""
        import torch

        from grpo.advantages import ESTIMATORS, assign_advantages

        generator = torch.Generator().manual_seed(self.number)
        for group in groups:
            group.rewards = torch.rand(GROUP, generator=generator)
            group.parts = {"random": group.rewards}
        assign_advantages(groups, ESTIMATORS["grpo"], {"random": 1.0})

    def stale(self, steps: int, rate: float) -> Iterator[None]:
        """The policy goes on learning from random rewards on what an old engine sampled; only the canary is asked."""
        canary = self.engine.canary
        right, groups = canary.logprobs, self.sampled()
        self.reward(groups)
        answers = itertools.cycle([right(canary.contexts, canary.completions) for _ in range(REPLAYS)])
        canary.logprobs = lambda contexts, completions: next(answers)
        try:
            for _ in range(steps):
                yield
                self.policy.update(self.pack(groups), self.loss, rate)
                canary.check()
        finally:
            canary.logprobs = right

    def wrong_draws(self, **change: Any) -> Iterator[None]:
        """Tokens that vLLM draws otherwise than the policy would."""
        from grpo.rollout.audit import Audit

        audit, right = Audit(self.policy, self.engine.canary.noise), self.engine._params
        self.engine.take_up()

        def changed(*arguments: Any, **asked: Any) -> Any:
            params = right(*arguments, **asked)
            for name, value in change.items():
                setattr(params, name, value)
            return params

        self.engine._params = changed
        try:
            for number in range(DRAWN):
                yield
                audit(self.sampled(group_size=1, prompts=2), number)
        finally:
            self.engine._params = right

    def until_found(self, steps: Iterator[None]) -> cases.Record:
        """How many steps it took until a sentence came, and the sentence; steps 0: none came."""
        begun = 0

        def go() -> None:
            nonlocal begun
            for _ in steps:
                if not self.in_time():
                    break
                begun += 1

        sentence = self.sentence_of(go)
        return {"steps": begun if sentence else 0, "tried": begun, "sentence": sentence}

    @staticmethod
    def sentence_of(work: Callable[[], object]) -> str:
        """What a check that fails says; nothing where none does."""
        from grpo.errors import UserError

        try:
            work()
        except UserError as error:
            return str(error)
        return ""


def in_a_line(record: cases.Record) -> str:
    """What was found, for the terminal."""
    honest = ", ".join(
        f"{one['steps']} honest steps at {one['rate']:g}: {'ALARM' if one['alarm'] else 'no alarm'}"
        for one in record["honest"]
    )
    found = [
        f"{name} {'found after ' + str(record[name]['steps']) if record[name]['steps'] else 'not found'}"
        for name in ("stale", "greedy", "top 20")
        if name in record
    ]
    return "; ".join([f"noise {record['noise']}", honest, *found])


if __name__ == "__main__":
    main()
