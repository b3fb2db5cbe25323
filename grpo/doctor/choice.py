"""Choice: what a configuration comes to on this machine: engine, kernels, layers, memory, disk. From config.json alone:
no weight is read or downloaded.

How its layers are run is found out as in a run, by `recognise`, over random weights of the model's own shapes. What a
layer computes depends on neither the number of tokens it knows nor the width of its MLP, so both are made small.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from grpo_kernels.dispatch import choose
from grpo_kernels.nf4 import BLOCK
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.pytorch_utils import Conv1D

from grpo.config import Config
from grpo.doctor.findings import Finding, found
from grpo.doctor.machine import GIB
from grpo.policy.building import compute_dtype
from grpo.policy.cache import full_cache_bytes, kv_bytes_per_token
from grpo.policy.experts import BIAS, are_experts, parameters_of
from grpo.policy.linears import is_quantized
from grpo.policy.load import choose_device, from_hub, model_source, settle_tables
from grpo.policy.optimizer import STATE_BYTES
from grpo.policy.promises import Promise
from grpo.policy.recognition import NotRecognisedError, recognise
from grpo.rollout.vllm_compat import INSTALL, why_not

SMALL = 64  # tokens of the vocabulary, and values within the MLP
BYTES_16, BYTES_FLOAT32 = 2, 4
OF_NF4 = 0.5 + BYTES_FLOAT32 / BLOCK  # bytes of a weight: 4 bits, and a scale for each block
PROMPT = 512  # tokens, where no row was read
SHARE = 0.9  # of a GPU that base weights may fill, with an adapter and one sequence beside them


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model."""

    linears: int  # in its layers' linears and experts
    others: int  # embedding, head, norms
    of_adapter: int  # per rank, of linears
    of_experts: int = 0  # the same of experts, where they have one

    def bytes_of(self, base: str) -> float:
        """Of the base weights, as a run keeps them."""
        each = {"nf4": OF_NF4, "bf16": BYTES_16, "float32": BYTES_FLOAT32}[base]
        return self.linears * each + self.others * (BYTES_FLOAT32 if base == "float32" else BYTES_16)


# ---- engine and kernels


def engine_of(config: Config, device: torch.device) -> tuple[str, Finding]:
    """ "vllm", "torch" or "server", and why not the faster one."""
    if config.engine == "server":
        return "server", Finding("fine", "engine", f"Servers sample: {', '.join(config.servers)}.")
    reason = why_not(config, device)
    if config.engine == "vllm" or (config.engine == "auto" and not reason):
        told = "vLLM samples, in this process. Where it does not know the model, --engine auto takes PyTorch's."
        asked = "vLLM samples, because --engine vllm asks for it."
        return "vllm", Finding("fine", "engine", asked if config.engine == "vllm" else told)
    told = "PyTorch samples, by the policy's own model"
    if config.engine == "torch":
        told += ", because --engine torch asks for it"
        if reason:
            return "torch", Finding("fine", "engine", f"{told}.")
        return "torch", Finding("hinders", "engine", f"{told}: vLLM is here and faster.", "Leave --engine torch out.")
    if device.type != "cuda":
        return "torch", Finding("fine", "engine", f"{told}. vLLM, the faster one, is not taken: {reason}.")
    remedy = {"float32": "Use --base bf16 or nf4."}.get(config.base, INSTALL)
    return "torch", Finding("hinders", "engine", f"{told}. vLLM, the faster one, is not taken: {reason}.", remedy)


def look_at_kernels(config: Config, device: torch.device) -> Finding:
    """Whether the Triton kernels run, or their twins in torch."""
    if device.type != "cuda":
        return Finding("fine", "kernels", "In plain torch, as is meant on a CPU; the Triton kernels are for GPUs.")
    dtype = compute_dtype(config.base, device)
    try:
        choose("A run", "triton", torch.empty(0, dtype=dtype, device=device))
    except ValueError as error:
        told = f"In plain torch, which is slower: {error}"
        return Finding("hinders", "kernels", told, 'pip install "triton>=3.3", or a GPU of capability 7.0 or more.')
    if dtype == torch.float16:
        told = "Triton's, in float16: this GPU has no bfloat16 arithmetic."
        return Finding("note", "kernels", told, "A GPU of compute capability 8.0 or more computes in bfloat16.")
    return Finding("fine", "kernels", f"Triton's, in {str(dtype).removeprefix('torch.')}.")


# ---- the model


def look_at_model(config: Config, device: torch.device) -> tuple[list[Finding], Sizes | None]:
    """What is known of a model by its config.json: whether it can be trained, how its layers are run, whether its
    weights fit. Its sizes, where its class is known."""
    findings: list[Finding] = []
    with found(findings, "model", "Use another model, or the checkpoint that this one was made from."):
        settings = from_hub(AutoConfig.from_pretrained, config.model)
        is_quantized(settings, config.model)
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)
        if kind is None:
            told = f"transformers has no causal language model for {config.model}, a {type(settings).__name__}."
            return [Finding("stops", "model", told, "Use a causal language model.")], None
        settings = _dense(settings, kind)
        sizes = _sizes(_on_meta(kind, settings))
        findings += [_layers(kind, settings), *_fits(config, device, sizes)]
        return findings, sizes
    return findings, None


def _dense(settings: Any, kind: Any) -> Any:
    """Of the part that is for text, without how its checkpoint is quantised: these weights are made here."""
    settings = copy.deepcopy(settings)
    if kind.config_class is settings.sub_configs.get("text_config"):
        settings = settings.get_text_config()
    for owner in (settings, settings.get_text_config()):
        if hasattr(owner, "quantization_config"):
            del owner.quantization_config
    return settings


def _on_meta(kind: Any, settings: Any) -> Any:
    with torch.device("meta"):
        return kind(settings)


def _sizes(model: Any) -> Sizes:
    head = model.get_output_embeddings()
    linears = [each for each in model.modules() if isinstance(each, (nn.Linear, Conv1D)) and each is not head]
    of_experts = [
        getattr(module, name)
        for module in model.modules()
        if are_experts(module)
        for name in parameters_of(module)
        if not name.endswith(BIAS)
    ]
    of_layers = sum(each.numel() for each in [*(each.weight for each in linears), *of_experts])
    others = sum(each.numel() for each in model.parameters()) - of_layers
    return Sizes(of_layers, others, sum(_sides(each.weight) for each in linears), sum(map(_sides, of_experts)))


def _sides(weight: Tensor) -> int:
    """Numbers of an adapter of rank 1, of a linear [M, K] or of experts [E, M, K]."""
    return weight.shape[:-2].numel() * sum(weight.shape[-2:])


def _layers(kind: Any, settings: Any) -> Finding:
    """Fused or as they are: by trial, over random weights."""
    settings = copy.deepcopy(settings)
    longest = getattr(settings.get_text_config(), "max_position_embeddings", None) or 2**20
    for name in ("vocab_size", "intermediate_size"):
        if isinstance(getattr(settings, name, None), int):
            setattr(settings, name, min(SMALL, getattr(settings, name)))
    settings.pad_token_id = None  # it may be beyond the few
    shapes = _on_meta(kind, settings).state_dict()
    weights = {name: Promise(shape, partial(_random, shape)) for name, shape in shapes.items()}
    try:
        model = kind.from_pretrained(None, config=settings, state_dict=weights, dtype=torch.float32)
        settle_tables(model)
        form = recognise(model.eval().requires_grad_(False), longest)
    except NotRecognisedError as why:
        told = f"Those of transformers' {kind.__name__}, a linear at a time, which is slower ({why})."
        remedy = "Models with layers as in Llama, Mistral, Qwen2, Qwen3 and Gemma run fused."
        return Finding("hinders", "layers", told, remedy)
    return Finding("fine", "layers", f"Fused, over packed sequences ({len(form.layers)} of {kind.__name__}).")


def _random(shape: Tensor) -> Tensor:
    """Weights as they are in a trained model: a product keeps the size of what it is given, and norms are about 1."""
    generator = torch.Generator().manual_seed(shape.numel())
    if not shape.is_floating_point():
        return torch.zeros(shape.shape, dtype=shape.dtype)
    if shape.ndim < 2:
        return 0.5 + torch.rand(shape.shape, generator=generator)
    return torch.randn(shape.shape, generator=generator) * shape.shape[-1] ** -0.5


def _fits(config: Config, device: torch.device, sizes: Sizes) -> list[Finding]:
    """Whether what a run cannot do without fits the GPU, and what it takes beside that, as far as sizes alone say.
    Activations are measured when it starts, and the plan is among its first lines."""
    weights, adapter = sizes.bytes_of(config.base) / GIB, bytes_of_adapter(config, sizes) / GIB
    cache = bytes_of_cache(config, device) / GIB
    told = (
        f"The base weights take about {weights:.2g} GiB in {config.base}, the adapter of rank {config.lora_rank} with "
        f"its gradient and optimizer {adapter:.2g}, keys and values of a whole rollout {cache:.2g} (prompts of "
        f"{PROMPT} tokens assumed)"
    )
    measured = "Activations are measured when the run starts, and the plan is printed."
    if device.type != "cuda":
        return [Finding("fine", "memory", f"{told}: of this machine's memory.")]
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    limit = min(total, config.memory_gib or total)
    if weights + adapter < SHARE * limit:
        in_turns = " Not all of a rollout is written at once." if weights + adapter + cache > limit else ""
        return [Finding("fine", "memory", f"{told}: of the {limit:.1f} to be had.{in_turns} {measured}")]
    remedy = "Use a smaller model." if config.base == "nf4" else "Use --base nf4, or a smaller model."
    return [Finding("stops", "memory", f"{told}: and {limit:.1f} are to be had.", remedy)]


def bytes_of_adapter(config: Config, sizes: Sizes) -> int:
    """Masters and gradients in float32, the optimizer's state, and the copy in 16 bits that is computed with."""
    of_state = STATE_BYTES[config.optimizer]
    return (2 * BYTES_FLOAT32 + of_state + BYTES_16) * config.lora_rank * _trained(config, sizes)


def bytes_of_cache(config: Config, device: torch.device) -> int:
    """Keys and values of all completions of a step at full length."""
    per_token = kv_bytes_per_token(model_source(config.model), compute_dtype(config.base, device))
    longest = config.max_completion_tokens + PROMPT
    return full_cache_bytes(config.prompts_per_step * config.group_size, longest, per_token)


def bytes_of_run(config: Config, sizes: Sizes) -> int:
    """What the checkpoints of a run take on its disk: those that are kept, the best, and the one being written; in each
    the adapter and two moments in float32."""
    return 3 * BYTES_FLOAT32 * config.lora_rank * _trained(config, sizes) * (config.keep + 2)


def _trained(config: Config, sizes: Sizes) -> int:
    """Numbers of the adapter, per rank."""
    return sizes.of_adapter + sizes.of_experts * config.expert_adapters


def device_of(config: Config, findings: list[Finding]) -> torch.device | None:
    """The device of a run; a finding where it cannot be had."""
    with found(findings, "gpu"):
        return choose_device(config)
    return None


def is_here(name: str) -> bool:
    """Whether a model is in a folder here, or ships."""
    return name == "embedded" or Path(name).is_dir()
