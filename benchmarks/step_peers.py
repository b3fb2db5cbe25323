"""Whole GRPO steps of TRL and of Unsloth (which is TRL's trainer over its own model and engine), timed by their hooks.

Knows nothing of ours. Both get the same model, prompts, LoRA and kind of reward; what else differs is said in the
record (`ran`). Packages of a peer are imported when it is measured, Unsloth before anything else.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from work import GROUP, PROMPTS, RANK, random_rewards, timed, torch_peaks

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTEXT = 1024  # tokens, at least, that the engines are built for

# Sequences in one forward and backward pass. TRL's best at 8B is 16 (4% faster than its usual 8); a larger model
# leaves less memory beside two copies of its weights.
BATCH = {"trl": 16, "trl-defaults": 8, "unsloth": 8}
SMALLER_BATCH = {("trl", "qwen2.5-14b"): 4, ("trl-defaults", "qwen2.5-14b"): 4}
# Share of the GPU that vLLM takes. TRL's own default, and what Unsloth's notebooks ask for.
SHARE = {"trl": 0.35, "trl-defaults": 0.35, "unsloth": 0.6}
LARGER_SHARE = {"qwen2.5-14b": 0.45}  # the weights alone are 27.5 GiB


def measure(contender: str, shape: str, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One peer on one model."""
    os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", UNSLOTH_DISABLE_STATISTICS="1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", "unsloth_cache")
    on_cpu = arguments.device == "cpu"
    trainer, settings = (unsloth_trainer if contender == "unsloth" else trl_trainer)(
        contender, shape, model, arguments, on_cpu
    )
    stages = Stages(on_cpu)
    time_stages(trainer, stages)
    trainer.add_callback(watch(stages, arguments.until))
    trainer.train()
    found = record(stages, arguments.started, trainer)
    ran = what_ran(settings, model) | {"old_logp_pass": found["old_logp_s"] > 0}
    return found | {"ran": ran} | torch_peaks(not on_cpu)


# ---- the two trainers


def trl_trainer(
    contender: str, shape: str, model: Path, arguments: argparse.Namespace, on_cpu: bool
) -> tuple[Any, Any]:
    """TRL over a model in bf16 that PEFT puts LoRA on."""
    import transformers
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS, lora_dropout=0.0, task_type="CAUSAL_LM")
    engine = {
        "use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": context(arguments),
        "vllm_gpu_memory_utilization": LARGER_SHARE.get(shape, SHARE[contender]),
        "generation_kwargs": {"ignore_eos": True},
    }  # fmt: skip
    if on_cpu:  # to try this file
        engine = {"use_cpu": True, "generation_kwargs": {"min_new_tokens": arguments.tokens}}
    if contender == "trl":
        engine["vllm_importance_sampling_correction"] = False
    settings = GRPOConfig(
        **common(contender, shape, arguments), **engine, bf16=not on_cpu,
        model_init_kwargs={"dtype": "float32" if on_cpu else "bfloat16"},
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=str(model), reward_funcs=[at_random], args=settings, train_dataset=dataset(tokenizer, arguments),
        processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip
    return trainer, settings


def unsloth_trainer(
    contender: str, shape: str, model: Path, arguments: argparse.Namespace, on_cpu: bool
) -> tuple[Any, Any]:
    """Unsloth: a model in NF4 that its vLLM engine shares. Its packages come last in the search path."""
    if arguments.unsloth_site:
        sys.path.append(str(arguments.unsloth_site))
    import unsloth
    from trl import GRPOConfig, GRPOTrainer

    network, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        model_name=str(model), max_seq_length=context(arguments), load_in_4bit=True, fast_inference=True,
        max_lora_rank=RANK, gpu_memory_utilization=SHARE[contender], max_num_seqs=PROMPTS * GROUP,
    )  # fmt: skip
    network = unsloth.FastLanguageModel.get_peft_model(
        network, r=RANK, lora_alpha=RANK, target_modules=LINEARS, use_gradient_checkpointing="unsloth",
        random_state=3407,
    )  # fmt: skip
    settings = GRPOConfig(
        **common(contender, shape, arguments), use_vllm=True, vllm_mode="colocate", bf16=True, optim="adamw_8bit",
        generation_kwargs={"ignore_eos": True},
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=network, reward_funcs=[at_random], args=settings, train_dataset=dataset(tokenizer, arguments),
        processing_class=tokenizer,
    )  # fmt: skip
    return trainer, settings


def common(contender: str, shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What both trainers are told: the work, and that nothing else is to be done."""
    batch = SMALLER_BATCH.get((contender, shape), BATCH[contender])
    return {
        "output_dir": str(arguments.folder / "trainer"), "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": PROMPTS * GROUP // batch, "num_generations": GROUP,
        "max_completion_length": arguments.tokens, "max_steps": arguments.steps, "temperature": 1.0,
        "learning_rate": 5e-6, "lr_scheduler_type": "constant", "mask_truncated_completions": False,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 3407,
    }  # fmt: skip


def context(arguments: argparse.Namespace) -> int:
    """Tokens of prompt and completion together that the engines are built for."""
    return max(CONTEXT, arguments.prompt_tokens + arguments.tokens)


def dataset(tokenizer: Any, arguments: argparse.Namespace) -> Any:
    """Chats of exactly so many tokens, the same for all."""
    from datasets import Dataset
    from random_models import questions

    tokenizer.padding_side = "left"
    texts = questions(tokenizer, PROMPTS * (arguments.steps + 1), arguments.prompt_tokens, seed=0)
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in texts]})


def at_random(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """A reward that teaches nothing and gives every group something to learn from."""
    return random_rewards(completions)


# ---- what a step's time goes to


class Stages:
    """Seconds of the stages of each step, by methods that are wrapped."""

    def __init__(self, on_cpu: bool):
        self.on_cpu = on_cpu
        self.now: dict[str, float] = {}
        self.open: set[str] = set()  # stages under way
        self.steps: list[dict[str, float]] = []
        self.first = 0.0  # time.time() after the first step
        self.last_end = 0.0

    def clock(self) -> float:
        """Seconds, when the GPU has done what it was asked for."""
        import torch

        if not self.on_cpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, owner: Any, method: str, stage: Callable[[], str]) -> None:
        """From now on this method's time counts for the stage that is named when it is called."""
        inner = getattr(owner, method)

        @functools.wraps(inner)
        def timed(*arguments: Any, **named: Any) -> Any:
            name = stage()
            if name in self.open:  # a method of a stage that calls another one of it
                return inner(*arguments, **named)
            self.open.add(name)
            start = self.clock()
            try:
                return inner(*arguments, **named)
            finally:
                self.now[name] = self.now.get(name, 0.0) + self.clock() - start
                self.open.remove(name)

        setattr(owner, method, timed)

    def end_step(self) -> None:
        """A step is over."""
        end = self.clock()
        self.steps.append(self.now | {"step": end - self.last_end})
        self.now, self.last_end = {}, end
        self.first = self.first or time.time()
        print({name: round(seconds, 3) for name, seconds in self.steps[-1].items()}, flush=True)


def time_stages(trainer: Any, stages: Stages) -> None:
    """Hooks of TRL 1.15 and of Unsloth 2026.10, which have most of them in common."""
    import torch

    stages.wrap(trainer, "_generate_and_score_completions", lambda: "before_update")
    stages.wrap(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda: "logp_in_update" if torch.is_grad_enabled() else "old_logp",
    )
    generation = getattr(trainer, "vllm_generation", None)
    if generation is None:
        stages.wrap(trainer, "_generate_single_turn", lambda: "rollout")
        return
    for method in ("sync_weights", "_unsloth_load_lora"):
        if hasattr(generation, method):
            stages.wrap(generation, method, lambda: "sync")
    stages.wrap(getattr(generation, "llm", None) or generation, "generate", lambda: "rollout")


def watch(stages: Stages, until: float | None) -> Any:
    """A callback that ends steps, and no further step is begun after `until`, a time.time()."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, *given: Any, **named: Any) -> None:
            stages.last_end = stages.clock()

        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> Any:
            stages.end_step()
            control.should_training_stop |= until is not None and time.time() > until
            return control

    return Watch()


# ---- what is told


def record(stages: Stages, started: float, trainer: Any) -> dict[str, Any]:
    """Medians of the timed steps, seconds; the start. The update is what is not sampling, syncing, scoring."""
    counted = timed(stages.steps)
    rows = []
    for step in counted:
        update = step["step"] - step["before_update"]
        known = {name: step.get(name, 0.0) for name in ("rollout", "sync", "old_logp")}
        rows.append(
            {"step": step["step"], "update": update, **known, "other": step["before_update"] - sum(known.values())}
        )
    lengths = [entry[name] for entry in trainer.state.log_history if (name := "completions/mean_length") in entry]
    return {
        **{f"{name}_s": round(statistics.median(row[name] for row in rows), 4) for name in rows[0]},
        "all_steps_s": [round(step["step"], 3) for step in stages.steps],
        "timed_steps": len(counted),
        "start_s": round(stages.first - started, 1),
        "completion_tokens": lengths[-1] if lengths else None,
    }


def what_ran(settings: Any, model: Path) -> dict[str, Any]:
    """Precision, batches and losses, from the settings as the trainer left them."""
    names = (
        "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "loss_type", "beta",
        "optim", "bf16", "vllm_importance_sampling_correction", "vllm_gpu_memory_utilization",
    )  # fmt: skip
    told = {name: str(value) for name in names if (value := getattr(settings, name, None)) is not None}
    base = "nf4" if model.name.endswith("-bnb-4bit") else "bf16"
    return {"base": base, **told}
