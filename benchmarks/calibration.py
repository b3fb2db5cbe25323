"""Is what an engine samples drawn from the policy? On any model and task, here or on a GPU.

The log-probabilities that an engine reports may be the policy's while its choices are not: a filter that was left on, a
broken generator. Then no comparison of log-probabilities finds it. But for a token drawn from a distribution the mean
of -log p is its entropy H, whatever came before, so over many tokens

    z = sum(-log p - H) / sqrt(n Var(-log p - H))

is a standard normal number, and |z| > 4 a broken sampler.

    python benchmarks/calibration.py                                    the embedded model, PyTorch's engine
    python benchmarks/calibration.py --engines torch vllm --model FOLDER --task benchmarks/learning_task.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from grpo.build import build_engine, build_policy
from grpo.packing import lay_out_to_read
from grpo.policy import Policy
from grpo.questions import build_questions
from grpo.rewards import score
from grpo.rollout.sampling import sample_groups
from grpo.task import load_task
from grpo.types import Group

GROUPS_AT_ONCE = 16  # scored by the policy in one batch


def main() -> None:
    """Each engine in a process of its own, so that none finds what another left."""
    arguments = parse_arguments()
    if len(arguments.engines) > 1:
        words = sys.argv[1:]
        for engine in arguments.engines:
            subprocess.run([sys.executable, __file__, *words, "--engines", engine], check=True)
        return
    measure(arguments.engines[0], arguments)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=["torch", "vllm"], default=["torch"])
    parser.add_argument("--task", type=Path, default=Path(__file__).parents[1] / "tasks" / "gsm8k.py")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--base", choices=["float32", "bf16", "nf4"], default="bf16")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3, help="rounds, each with other seeds")
    return parser.parse_args()


def measure(engine_name: str, arguments: argparse.Namespace) -> None:
    """A line a round: pass@1, mean surprise and entropy in nats a token, z, and the mean |log p - policy's log p|."""
    task = load_task(arguments.task)
    config = replace(
        task.config, model=arguments.model, data=arguments.data, base=arguments.base, engine=engine_name,
        eval_prompts=arguments.prompts, eval_samples=arguments.samples, max_completion_tokens=160,
    )  # fmt: skip
    questions = build_questions(task, config)
    policy = build_policy(config, questions.tokenizer, questions.longest_sequence)
    engine = build_engine(config, policy, questions.tokenizer, questions.canary_prompts, questions.longest_sequence)
    print(f"{'engine':<8}{'seed':>5}{'pass@1':>9}{'surprise':>10}{'entropy':>10}{'z':>7}{'gap':>10}", flush=True)
    name, value = task.solved
    for seed in range(arguments.seeds):
        groups = sample_groups(engine, questions.test, arguments.samples, config.max_completion_tokens, seed)
        score(groups, questions.rewards)
        right = torch.cat([group.parts[name] >= value for group in groups]).float().mean()
        surprise, entropy, gap = calibration(policy, groups)
        z = z_of(surprise - entropy)
        print(
            f"{engine_name:<8}{seed:>5}{right:>9.1%}{surprise.mean():>10.5f}{entropy.mean():>10.5f}{z:>7.2f}"
            f"{gap.mean():>10.1e}",
            flush=True,
        )
    engine.close()


@torch.no_grad()
def calibration(policy: Policy, groups: list[Group]) -> tuple[Tensor, Tensor, Tensor]:
    """Of every sampled token, [n] each: -log p, the entropy of its distribution, |log p - the sampler's|."""
    rows: list[tuple[Tensor, ...]] = []
    for start in range(0, len(groups), GROUPS_AT_ONCE):
        part = groups[start : start + GROUPS_AT_ONCE]
        batch = lay_out_to_read(part, policy.device)
        logprobs, entropy = policy.logprobs(batch)
        sampled = batch.mask
        rows.append((-logprobs[sampled], entropy[sampled], (logprobs - batch.sampler_logprobs)[sampled].abs()))
    surprise, entropy, gap = (torch.cat(column).cpu() for column in zip(*rows, strict=True))
    return surprise, entropy, gap


def z_of(excess: Tensor) -> float:
    """The mean of independent numbers [n] of mean 0, in standard errors."""
    return float(excess.mean() / (excess.std() / len(excess) ** 0.5))


if __name__ == "__main__":
    main()
