"""Load: a Hugging Face checkpoint -> tokenizer and a model over projections. Knows nothing of losses or rollouts."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, get_checkpoint_shard_files
from transformers.utils.peft_utils import find_adapter_config_file

from grpo.config import Config, ModelConfig, RolloutConfig
from grpo.embedded import MODEL_DIR
from grpo.errors import UserError, is_out_of_memory
from grpo.policy import fused, generic
from grpo.policy.allocator import grow_segments, let_loose
from grpo.policy.building import build_experts, build_projection, compute_dtype, kept_dtype
from grpo.policy.complete import check_complete
from grpo.policy.form import LINEARS, ModelForm
from grpo.policy.fused import FusedModel
from grpo.policy.generic import GenericModel
from grpo.policy.linears import NF4Linear, adopt_quantized, is_quantized
from grpo.policy.mxfp4 import dense_promises, is_mxfp4
from grpo.policy.projections import Projection, ProjectionStore, double_quantize
from grpo.policy.promises import Checkpoint, NotPromised, Progressed, no_progress, settle
from grpo.policy.quantization import Choice, choose
from grpo.policy.recognition import NotRecognisedError, recognise
from grpo.policy.rope import check_rope
from grpo.policy.shards import Shards, is_sharded, not_recognised
from grpo.policy.stop import stop_tokens
from grpo.world import ALONE, World

transformers_logging.disable_progress_bar()  # the run has one of its own
# Nor is its table of what is missing or too many wanted: what matters of it is told in a sentence.
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())

Model = FusedModel | GenericModel

ADAPTER = "adapter_config.json"

UNLIMITED_CONTEXT = 2**20  # tokens


@dataclass
class Loaded:
    """A model ready to be trained: its weights live in `store`."""

    model: Model
    store: ProjectionStore
    conv1d: bool  # the checkpoint keeps its linears transposed (GPT-2), which PEFT wants to know
    stop_tokens: list[int]  # any of them ends a completion
    source: str  # name or folder, as the adapter's files record it


def choose_device(config: ModelConfig) -> torch.device:
    """The device a run is on.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda is asked for, but PyTorch sees no GPU here. Use --device cpu or auto.")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def model_source(name: str) -> str:
    """Where Hugging Face finds a model: the folder that ships with the package for "embedded", else the name itself."""
    return str(MODEL_DIR) if name == "embedded" else name


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        UserError: no such model here or on the hub, or it comes without a tokenizer.
    """
    tokenizer = from_hub(AutoTokenizer.from_pretrained, name)
    # Without its files transformers makes an empty tokenizer of the model's kind.
    if not tokenizer("1 + 1", add_special_tokens=False)["input_ids"]:
        raise UserError(
            f"The model {name} has no tokenizer: no token comes of a text. Put the tokenizer's files (tokenizer.json, "
            "tokenizer_config.json) beside its weights."
        )
    return tokenizer


def ends_of_completion(name: str, tokenizer: Any) -> list[int]:
    """The tokens that end a completion of a model, as it will be when it is loaded; none of its weights is read.

    Raises:
        UserError: there is none, or the generation settings name what is no token.
    """
    settings = from_hub(lambda source, trust_remote_code: _generation_settings(source), name)
    return stop_tokens(settings.eos_token_id, tokenizer, vocabulary_size(name))


def vocabulary_size(name: str) -> int:
    """How many tokens the model's embedding has a row for."""
    return from_hub(AutoConfig.from_pretrained, name).get_text_config().vocab_size


def context_length(name: str, config: RolloutConfig) -> int:
    """Prompt + completion in tokens: --max-context, else what the model was built for.

    Raises:
        UserError: --max-context is more than the model can.
    """
    settings = from_hub(AutoConfig.from_pretrained, name).get_text_config()
    # Models whose positions are relative (Bloom) or none (Mamba) name no limit.
    built_for = getattr(settings, "max_position_embeddings", UNLIMITED_CONTEXT)
    if config.max_context > built_for:
        raise UserError(f"--max-context is {config.max_context}, but {name} was built for {built_for} tokens.")
    return config.max_context or built_for


def load_model(
    config: Config,
    device: torch.device,
    longest: int,
    tokenizer: Any = None,
    note: Callable[[str], object] = print,
    progressed: Progressed = no_progress,
    prompts: Sequence[list[int]] = (),
    dense: Sequence[str] | None = None,
    world: World = ALONE,
) -> Loaded:
    """The model of a configuration over a fresh adapter, on `device`.

    The checkpoint's tensors are read one projection after the other, moved and quantised there: neither this machine's
    memory nor the GPU ever holds much more than the finished model. longest: the longest sequence that will be run, in
    tokens. tokenizer: what is asked, beside the generation settings, which tokens end a completion. note: told what a
    user may want to know; progressed: how much is read. For --quantization dynamic: prompts, their tokens, that it is
    measured on; dense: what was chosen before, if it was. world: whose ranks keep a part of the base each, for
    --shard-base.

    Raises:
        UserError: the checkpoint is not to be had, damaged, not complete, or quantised in a way that cannot be read.
    """
    if device.type == "cuda":
        grow_segments()
        let_loose()  # what an earlier run of this process was held to
    shards = Shards(world) if is_sharded(config, world, note) else None
    dtype = compute_dtype(config.base, device)
    model = _read_checkpoint(config.model, dtype, note, progressed)
    model.eval().requires_grad_(False)
    check_rope(model.config, longest, config.model)
    recompute = config.recompute == "layer" or (config.recompute == "auto" and device.type == "cuda")
    build = partial(build_projection, config=config, dtype=dtype, device=device, has_room=not shards)
    stop = stop_tokens(model.generation_config.eos_token_id, tokenizer, model.get_input_embeddings().num_embeddings)
    conv1d = any(isinstance(module, Conv1D) for module in model.modules())
    settle_tables(model)
    form, why = _form_of(model, longest)
    if config.quantization == "dynamic":
        form = _check_dynamic(config.model, model, form, dense or [])
        dtypes = (dtype, kept_dtype("bf16", dtype))
        chosen = partial(choose, model, form, build, prompts, device, dtypes, config.dynamic_allowance)
        build = partial(build, dense=_dense(chosen, dense, note))
    if form and shards:
        store = fused.fuse(model, form, build, partial(_take, shards, config.double_quant == "on"))
        store.shared_by = world.size
        shards.settle()
        settle(model, device)
        ours: Model = FusedModel(model, form, store, recompute, shards.around).to(device)
        note(f"layers: fused, over packed sequences ({len(form.layers)} of {type(model).__name__}); {shards.told}")
    elif shards:
        raise not_recognised(config, model, why)
    elif form:
        store = fused.fuse(model, form, build)
        settle(model, device)
        ours = FusedModel(model, form, store, recompute).to(device)
        note(f"layers: fused, over packed sequences ({len(form.layers)} of {type(model).__name__})")
    else:
        store = generic.fuse(model, build, partial(build_experts, config=config, dtype=dtype, device=device))
        settle(model, device)
        ours = GenericModel(model.to(device), recompute)
        note(
            f"layers: those of transformers' {type(model).__name__}, a linear at a time, {ours.told}; "
            f"slower than fused layers ({why})"
        )
    if config.double_quant == "on" and not shards:
        store.double_quantize()
    store.initialise(config.lora_alpha, config.seed)
    progressed(1, 1)
    gc.collect()
    return Loaded(ours, store, conv1d, stop, model_source(config.model))


def _take(shards: Shards, double_quant: bool, projections: list[Projection]) -> None:
    """A layer's bases, as they are to be for good."""
    for projection in projections * double_quant:
        double_quantize(projection)
    shards.take(projections)


def _form_of(model: Any, longest: int) -> tuple[ModelForm | None, str]:
    """What the model computes, if that is known, or why it is not."""
    try:
        return recognise(model, longest), ""
    except NotRecognisedError as why:
        return None, str(why)


def _dense(chosen: Callable[[], Choice], before: Sequence[str] | None, note: Callable[[str], object]) -> Sequence[str]:
    """The projections that stay in 16 bits: those of before, or chosen now. The user is told."""
    if before is not None:
        told = f"{', '.join(before)} in 16 bits, as --quantization dynamic chose before"
        note(f"note: {told if before else 'nothing in 16 bits, as the run was trained so far'}.")
        return before
    choice = chosen()
    note(f"note: {choice}")
    return choice.dense


def _check_dynamic(name: str, model: Any, form: ModelForm | None, dense: Sequence[str]) -> ModelForm:
    """There is something to choose from, and what was chosen before is there."""
    if form is None:
        raise UserError(
            f"--quantization dynamic is for models whose layers are recognised (Llama, Mistral, Qwen2, Qwen3 and their "
            f"kin); {name} is a {type(model).__name__}. Use --quantization uniform."
        )
    if any(isinstance(module, NF4Linear) for module in model.modules()):
        raise UserError(
            f"The checkpoint {name} is in NF4 already, so nothing of it can stay in 16 bits. Use --quantization "
            "uniform, or the checkpoint that it was made from."
        )
    known = {f"{index}.{part}" for index in range(len(form.layers)) for part in LINEARS}
    if unknown := sorted(set(dense) - known):
        raise UserError(
            f"The run kept {', '.join(unknown)} in 16 bits, which {name} does not have. Give the model that it began "
            "with."
        )
    return form


def _read_checkpoint(name: str, dtype: torch.dtype, note: Callable[[str], object], progressed: Progressed) -> Any:
    """The Hugging Face model on the CPU, in `dtype` but for the linears that the checkpoint has in NF4. Its weights are
    promised, not read, where they can be."""
    settings = from_hub(AutoConfig.from_pretrained, name)
    quantized = is_quantized(settings, name)
    # Sizes that do not match come back in the report, like weights that are missing: both are told in one sentence.
    how = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if quantized:
        # Without a device_map transformers would put a quantised checkpoint on the GPU.
        read = partial(AutoModelForCausalLM.from_pretrained, device_map="cpu", **how)
    else:
        read = partial(_promised_or_whole, settings, how, note, progressed)
    model, report = from_hub(read, name)
    check_complete(name, model, report)
    if getattr(model, "_hf_peft_config_loaded", False):
        _refuse_adapter(name)
    if quantized:
        for parameter in model.parameters():  # transformers 5.24 leaves what is in 16 bits as it is
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        adopt_quantized(model, dtype)
    return model


def _promised_or_whole(
    settings: Any,
    how: dict[str, Any],
    note: Callable[[str], object],
    progressed: Progressed,
    source: str,
    trust_remote_code: bool,
) -> tuple[Any, dict[str, Any]]:
    """The model, with promises for weights if its checkpoint allows it, and transformers' report."""
    why_whole = "they are not in safetensors files"
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)
    if kind and (files := safetensors_files(settings, source)):
        try:
            return _promised(kind, settings, how, promised_tensors(settings, files, progressed), source)
        except NotPromised:
            why_whole = f"{kind.__name__} changes them on loading"
    if is_mxfp4(settings):
        raise UserError(
            f"The checkpoint {source} is in MXFP4 and cannot be read: {why_whole}. Use one in bf16 that was made of it."
        )
    whole: Any = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trust_remote_code, **how)
    note(f"note: the weights of {source} are read all at once, which this machine's memory has to hold: {why_whole}.")
    return whole


def whole_model(name: str) -> Any:
    """The Hugging Face model of a checkpoint in the dtype of its files, all of it read, as it can be saved again."""
    settings = from_hub(AutoConfig.from_pretrained, name)
    if not is_mxfp4(settings):
        return from_hub(partial(AutoModelForCausalLM.from_pretrained, dtype="auto"), name)
    # What transformers itself makes of MXFP4 it saves under names that nobody reads ("down_proj$").
    how = {"dtype": torch.bfloat16, "output_loading_info": True}
    model, _ = from_hub(partial(_promised_or_whole, settings, how, str, no_progress), name)
    settle(model, torch.device("cpu"))
    return model


def promised_tensors(settings: Any, files: list[str], progressed: Progressed) -> dict[str, Tensor]:
    """The tensors of a checkpoint's files by their names, promised; dense ones in place of those in MXFP4."""
    tensors = Checkpoint(files, progressed).promised
    return dense_promises(tensors) if is_mxfp4(settings) else tensors


def safetensors_files(settings: Any, source: str) -> list[str]:
    """The checkpoint's safetensors files, got from the hub where they are not here; none, if it has no such files or
    its config names others."""
    if getattr(settings, "transformers_weights", None):
        return []
    optional = {"_raise_exceptions_for_gated_repo": False, "_raise_exceptions_for_missing_entries": False}
    if alone := cached_file(source, SAFE_WEIGHTS_NAME, **optional):
        return [alone]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **optional)
    return (get_checkpoint_shard_files(source, index)[0] or []) if index else []


def _promised(
    kind: Any, settings: Any, how: dict[str, Any], tensors: dict[str, Tensor], source: str
) -> tuple[Any, dict[str, Any]]:
    if find_adapter_config_file(source):
        _refuse_adapter(source)
    if kind.config_class is settings.sub_configs.get("text_config"):  # the part of a larger model that is for text
        settings = settings.get_text_config()
    if is_mxfp4(settings):
        del settings.quantization_config  # of what is in the files, and no longer in the tensors
    # Without a name transformers looks for no files: what it would find beside the weights is asked for here.
    model, report = kind.from_pretrained(None, config=settings, state_dict=tensors, **how)
    model.generation_config = _generation_settings(source)
    return model, report


def _generation_settings(source: str) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:  # there are none; the tokens may be in the model's own settings
        return GenerationConfig.from_pretrained(source, config_file_name="config.json", _from_model_config=True)


def _refuse_adapter(name: str) -> NoReturn:
    raise UserError(
        f"The model {name} comes with an adapter beside its weights. Merge it with PEFT's merge_and_unload, "
        "and give a folder that holds the merged model alone."
    )


def settle_tables(model: Any) -> None:
    """Read what is outside of the layers: embedding, head, last norm."""
    layers = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    settle(model, torch.device("cpu"), lambda name: not name.startswith(tuple(layers)))


def _check_no_adapter(name: str, folder: Path) -> None:
    """Nothing in the model's folder is an adapter, which transformers would put on top without a word where PEFT is
    installed, and leave out where it is not."""
    if not os.path.isfile(folder / ADAPTER):  # says no where pathlib raises: a folder that may not be read
        return
    if os.path.isfile(folder / "config.json"):
        raise UserError(
            f"The folder {name} holds a model and, by its {ADAPTER}, an adapter too, which may be in the model's "
            f"weights already. If it is, take {ADAPTER} and the adapter's weights out of the folder; else merge the "
            "adapter into its model with PEFT's merge_and_unload and give a folder that holds the merged model alone."
        )
    raise UserError(
        f"The folder {name} holds an adapter, not a model. Give its model as --model, and the folder as --adapter to "
        "begin from it; go on with a run with --resume, or score one with --eval."
    )


def from_hub(load: Any, name: str) -> Any:
    """load(source), with the dozen ways in which a hub can fail, or a file be damaged, told as one sentence."""
    source = model_source(name)
    _check_no_adapter(name, Path(source))
    try:
        # Said, because transformers asks on the terminal otherwise, and "y" runs whatever came with the weights.
        return load(source, trust_remote_code=False)
    except Exception as error:  # each file format, and the hub's client, raises classes of its own
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"The model {name} comes with code of its own, which loading it would run. It is not run "
                "(trust_remote_code is off): use a model whose kind transformers knows by itself."
            ) from error
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".:")
        if Path(source).is_dir():
            raise UserError(
                f"The model in the folder {name} cannot be loaded ({type(error).__name__}: {reason}). A file of it is "
                "missing or damaged: get it anew, or use --model embedded, which ships with the package."
            ) from error
        raise UserError(
            f"The model {name} is neither a folder here nor to be had from the hub: {reason}. "
            "Check the name and the network, or use --model embedded, which ships with the package."
        ) from error
