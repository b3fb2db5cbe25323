"""Trained: a run's folder, a checkpoint, an adapter or a model -> a policy to talk to.
Knows nothing of conversations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from grpo.config import Config
from grpo.errors import UserError
from grpo.export.source import Source, find
from grpo.folder import is_checkpoint, is_run, run_of
from grpo.policy import Policy, load_model, load_tokenizer
from grpo.policy.adapter import SETTINGS, describe, load_adapter
from grpo.policy.load import choose_device, context_length
from grpo.policy.promises import Progressed, no_progress
from grpo.record.jsonl import read_lines

LOOKED_AT = 64  # prompts of a run, for its system prompt
Base = Literal["float32", "bf16", "nf4"]


@dataclass(frozen=True)
class Asked:
    """What the command line says of the model."""

    run: str
    checkpoint: str = "best"  # "best", "last" or a step
    model: str | None = None  # the base, where it is elsewhere than the adapter says
    base: Base | None = None  # how its weights are kept; None: as in the run, else in 16 bits
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass
class Trained:
    """A policy to talk to."""

    policy: Policy
    tokenizer: Any
    config: Config  # of its run, or one that is made for it
    title: str
    has_adapter: bool
    system: str  # the task's system prompt; empty where none is known
    context: int  # prompt and completion together, in tokens


def open_trained(asked: Asked, note: Callable[[str], object] = print, progressed: Progressed = no_progress) -> Trained:
    """Load it. `note` is told what a user may want to know.

    Raises:
        UserError: there is no such thing, or it is damaged.
    """
    source = None if _is_model(asked) else find(asked.run, asked.checkpoint, asked.model)
    config = _config(asked, source)
    context = context_length(config.model, config)
    tokenizer = load_tokenizer(config.model)
    dense = list(source.dense) if source and source.config else None
    loaded = load_model(config, choose_device(config), context, tokenizer, note, progressed, dense=dense)
    policy = Policy(loaded, config)
    if source and (without := load_adapter(policy, source.folder)):
        note(
            f"note: the adapter in {source.folder} has nothing for {len(without)} of the model's linear layers, such "
            f"as {without[0]}: they compute what the base computes."
        )
    title = f"{source.title}, over {config.model}" if source else config.model
    system = system_of(run_of(source.folder)) if source else ""
    return Trained(policy, tokenizer, config, title, bool(source), system, context)


def _is_model(asked: Asked) -> bool:
    """Whether a model is meant, with nothing trained beside it: of this package, in a folder, or on the hub."""
    path = Path(asked.run)
    if not path.is_dir():
        return asked.run == "embedded" or (asked.run.count("/") == 1 and not asked.run.startswith((".", "/", "~")))
    trained = is_run(path) or is_checkpoint(path) or (path / SETTINGS).is_file()
    return not trained and (path / "config.json").is_file()


def _config(asked: Asked, source: Source | None) -> Config:
    """The configuration that it is loaded by: its run's, else one made for it."""
    made = Config(device=asked.device)
    plain: Base = "bf16" if choose_device(made).type == "cuda" else "float32"
    if source is None:
        if asked.model or asked.checkpoint != "best":
            raise UserError(f"{asked.run} is a model: it goes with neither --model nor --checkpoint. Leave them out.")
        return replace(made, model=asked.run, base=asked.base or plain, lora_rank=1)
    described = describe(source.folder)
    fields = dict(
        model=source.base,
        device=asked.device,
        lora_rank=source.rank,
        lora_alpha=described.alpha,
        expert_adapters=described.experts,
        adapter="",
    )
    if source.config is None:
        return replace(made, base=asked.base or plain, **fields)
    # No optimizer is used, and bitsandbytes need not be here. Another base than the run's is another model's rounding.
    base = asked.base or source.config.base
    nf4 = base == "nf4"
    rounding = dict(
        quantization=source.config.quantization if nf4 else "uniform",
        double_quant=source.config.double_quant if nf4 else "off",
    )
    others = dict(base=base, **rounding, optimizer="adamw", reference="base", recompute="none")
    return replace(source.config, **fields, **others)


def system_of(run: Path) -> str:
    """The system prompt of a run's first prompts, as its records have it; empty where these differ or are not there."""
    said: set[str] = set()
    with suppress(UserError, OSError):
        for record in islice(read_lines(run / "prompts.jsonl"), LOOKED_AT):
            said.add(_system_in(record.get("messages")))
    return said.pop() if len(said) == 1 else ""


def _system_in(messages: Any) -> str:
    first = messages[0] if isinstance(messages, list) and messages else None
    content = first.get("content") if isinstance(first, dict) and first.get("role") == "system" else ""
    return content if isinstance(content, str) else ""
