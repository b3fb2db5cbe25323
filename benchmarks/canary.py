"""Does the canary stay silent over an honest run in low precision, and how soon does it find a stale engine?

    python benchmarks/canary.py --shape llama-3.1-8b --base bf16 nf4      writes benchmarks/results/canary.json

Whole steps of the product over random weights in true shapes: vLLM samples, random rewards, an update, a sync. After
the honest steps the engine is made stale: the canary is answered with the engine's own measurements of the last honest
version, one of several each time, so that their noise is real, while the policy goes on moving. Then tokens are drawn
wrongly: greedily, and from the 20 likeliest, with the log-probabilities that vLLM gives for them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from random_models import write_model
from rollout import NoText, synchronize

from grpo.advantages import ESTIMATORS, assign_advantages
from grpo.config import Config
from grpo.errors import UserError
from grpo.loss import build_loss
from grpo.packing import build_packer
from grpo.policy import Policy
from grpo.policy.load import choose_device, load_model
from grpo.rollout.audit import Audit
from grpo.rollout.sampling import sample_groups
from grpo.types import Group, Prompt

RESULT = Path(__file__).parent / "results" / "canary.json"
PROMPTS, GROUP, PROMPT_TOKENS = 8, 8, 256
REPLAYS = 8  # measurements of the last honest version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--base", nargs="+", default=["bf16", "nf4"])
    parser.add_argument("--tokens", type=int, default=128, help="of a completion")
    parser.add_argument("--steps", type=int, default=40, help="honest ones")
    parser.add_argument("--more", type=int, default=40, help="steps to find a stale engine in")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--stale-rate", type=float, default=1e-4, help="learning rate while the engine is stale")
    parser.add_argument("--eager", action="store_true")
    arguments = parser.parse_args()
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_FLASHINFER_SAMPLER="0", VLLM_LOGGING_LEVEL="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        write_model(arguments.shape, Path(folder))
        rows = [measure(base, Path(folder) / arguments.shape, arguments) for base in arguments.base]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {"gpu": gpu, "torch": torch.__version__, "date": date.today().isoformat()}
    RESULT.write_text(json.dumps({"machine": machine, "arguments": vars(arguments), "rows": rows}, indent=2) + "\n")


def measure(base: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One engine: honest steps, a stale engine, wrong draws."""
    from grpo.rollout.vllm_engine import VllmEngine

    longest = PROMPT_TOKENS + arguments.tokens
    config = Config(
        model=str(folder), base=base, engine="vllm", prompts_per_step=PROMPTS, group_size=GROUP,
        max_completion_tokens=arguments.tokens, eval_prompts=PROMPTS, mask_truncated=False, kv_cache_gib=4.0,
        learning_rate=arguments.learning_rate, rollout_graphs="none" if arguments.eager else "decode",
    )  # fmt: skip
    policy = Policy(load_model(config, choose_device(config), longest), config)
    policy.stop_tokens = []
    asked = prompts(0, policy.model.head.shape[0])
    engine = VllmEngine(policy, NoText(), [prompt.tokens for prompt in asked[:2]], config, longest)
    audit = Audit(policy, engine.canary.noise)
    print(f"{base}: noise {engine.canary.noise:.3g} over {len(engine.canary.last.engine)} tokens", flush=True)
    steps = [step(number, config, policy, engine, audit) for number in range(arguments.steps)]
    row = {
        "base": base,
        "noise": engine.canary.noise,
        "canary_tokens": len(engine.canary.last.engine),
        "largest_gap": max(one["sync/gap"] for one in steps),
        "mean_rank": statistics.mean(one["mismatch/rank"] for one in steps),
        "unproved": [one["sync/unproved"] for one in steps],
        "sync_s": statistics.median(one["sync_s"] for one in steps),
        "audit_s": statistics.median(one["audit_s"] for one in steps),
        "step_s": statistics.median(one["step_s"] for one in steps),
    }
    row["stale"] = found(lambda: stale(engine, config, policy, arguments))
    row["greedy"] = found(lambda: wrong_draws(engine, policy, engine.canary.noise, temperature=0.0))
    row["top 20"] = found(lambda: wrong_draws(engine, policy, engine.canary.noise, top_k=20))
    print(json.dumps(row), flush=True)
    engine.close()
    return row


def prompts(seed: int, vocabulary: int) -> list[Prompt]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(10, vocabulary - 10, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
    return [Prompt(index, "", tokens, {}) for index, tokens in enumerate(rows)]


def step(number: int, config: Config, policy: Policy, engine: Any, audit: Audit) -> dict[str, float]:
    """One step of the product, with random rewards."""
    start = time.perf_counter()
    asked = prompts(number + 1, policy.model.head.shape[0])
    groups = sample_groups(engine, asked, GROUP, config.max_completion_tokens, seed=number)
    before_audit = time.perf_counter()
    measured = audit(groups, number)
    audit_s = time.perf_counter() - before_audit
    reward(groups, number)
    engine.release()
    measured |= policy.update(build_packer(config, policy.device)(groups), build_loss(config), config.learning_rate)
    audit.check_gap(measured["mismatch/gap"])
    synchronize()
    before_sync = time.perf_counter()
    measured |= engine.sync()
    now = time.perf_counter()
    return measured | {"audit_s": audit_s, "sync_s": now - before_sync, "step_s": now - start}


def reward(groups: list[Group], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in groups:
        group.rewards = torch.rand(GROUP, generator=generator)
        group.parts = {"random": group.rewards}
    assign_advantages(groups, ESTIMATORS["grpo"], {"random": 1.0})


def stale(engine: Any, config: Config, policy: Policy, arguments: argparse.Namespace) -> None:
    """The policy goes on learning from random rewards on what an old engine sampled; only the canary is asked."""
    canary, right = engine.canary, engine.canary.logprobs
    asked = prompts(1, policy.model.head.shape[0])
    groups = sample_groups(engine, asked, GROUP, config.max_completion_tokens, seed=1)
    answers = itertools.cycle([right(canary.contexts, canary.completions) for _ in range(REPLAYS)])
    canary.logprobs = lambda contexts, completions: next(answers)
    loss, pack = build_loss(config), build_packer(config, policy.device)
    try:
        for number in range(arguments.more):
            reward(groups, 1)
            policy.update(pack(groups), loss, arguments.stale_rate)
            canary.check()
            found.steps = number + 2
    finally:
        canary.logprobs = right


def wrong_draws(engine: Any, policy: Policy, noise: float, **change: Any) -> None:
    """Tokens that vLLM draws otherwise than the policy would."""
    audit, right = Audit(policy, noise), engine._params
    engine.take_up()

    def changed(*arguments: Any, **asked: Any) -> Any:
        params = right(*arguments, **asked)
        for name, value in change.items():
            setattr(params, name, value)
        return params

    engine._params = changed
    try:
        for number in range(20):
            asked = prompts(number + 100, policy.model.head.shape[0])[:2]
            audit(sample_groups(engine, asked, 1, engine.config.max_completion_tokens, seed=number), number)
            found.steps = number + 2
    finally:
        engine._params = right


def found(check: Any) -> dict[str, Any]:
    """How many steps it took until a sentence came, and the sentence."""
    found.steps = 1
    try:
        check()
    except UserError as error:
        return {"steps": found.steps, "sentence": str(error)}
    return {"steps": None, "sentence": ""}


if __name__ == "__main__":
    main()
