"""The first lines of a run: what is trained or scored, on what, by what, in which folder. Whatever else is printed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from grpo.config import Config
from grpo.folder import Saved
from grpo.policy import Policy
from grpo.rollout import Engine
from grpo.rollout.idle import Idle, OnCall
from grpo.rollout.server import ServerEngine
from grpo.rollout.torch_engine import TorchEngine
from grpo.task import Task

EMBEDDED = "the tiny one that ships with the package: it shows the loop and knows no world"


def opening(config: Config, policy: Policy, engine: Engine) -> Iterator[str]:
    """A line each; of the rows there is one already, where they were read."""
    what_it_is = f" ({EMBEDDED})" if config.model == "embedded" else ""
    yield f"model: {config.model}{what_it_is}, base weights in {config.base}, on {device_in_words(policy.device)}"
    trainable = sum(parameter.numel() for parameter in policy.store.parameters())
    begun = f", begun from {config.adapter}" if config.adapter else ""
    yield f"adapter: LoRA of rank {config.lora_rank}, {trainable:,} trainable parameters{begun}"
    yield f"engine: {engine_in_words(engine)}"


def what_comes(config: Config, task: Task, saved: Saved) -> Iterator[str]:
    """Of a run: what it is to learn, in how many steps of what size, and where it is written."""
    yield f"task: {task.name} ({saved.task})"
    held_out = f"every {config.eval_every} steps" if config.eval_every else "before and after"
    size = {
        "grpo": f"prompts x {config.group_size} completions of at most {config.max_completion_tokens:,} tokens",
        "sft": "answers",
        "dpo": "pairs",
    }[config.method]
    asked = f"{config.eval_prompts} held-out prompts x {config.eval_samples}"
    scored = asked if task.rewards and config.engine != "none" else "the held-out score"
    yield (
        f"plan: {config.steps:,} steps of {config.prompts_per_step} {size}; {scored} {held_out}; a checkpoint every "
        f"{config.save_every} steps"
    )
    yield f"run folder: {saved.folder}"


def device_in_words(device: torch.device) -> str:
    """ "cuda (NVIDIA H100 80GB HBM3)", or "cpu"."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def engine_in_words(engine: Engine) -> str:
    """Who samples."""
    engine = engine.engine if isinstance(engine, OnCall) else engine
    if isinstance(engine, Idle):
        return "none, for nobody samples"
    if isinstance(engine, ServerEngine):
        return engine.told
    own = isinstance(engine, TorchEngine)
    return "PyTorch, the policy's own model" if own else "vLLM, in this process, over the policy's weights"
