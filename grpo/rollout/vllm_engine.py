"""VllmEngine: vLLM in this process, sampling from the trainer's own weights. Knows nothing of rewards or gradients.

    build      the policy's weights are linked into vLLM (`SharedLink`), or its adapter is (`AdapterLink`, for models
               that vLLM builds otherwise); the canary proves it
    sample     token ids in; token ids and log-probabilities at the sampling temperature out
    release    the KV cache's memory goes back to PyTorch for the update; the next call takes it again
    sync       the link brings what it must, cached prefixes are dropped, the canary proves it again

What belongs to vLLM's inside is in vllm_compat.py, vllm_memory.py and vllm_sampled.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from grpo.config import Config
from grpo.errors import UnsuitedEngine, UserError, is_out_of_memory
from grpo.policy import Policy
from grpo.policy.cache import full_cache_bytes, kv_bytes_per_token
from grpo.policy.routing import experts_in, together, watched
from grpo.rollout import vllm_compat, vllm_sampled
from grpo.rollout.canary import build_canary
from grpo.rollout.engine import Finished, completion_of, nobody
from grpo.rollout.vllm_memory import find_kv_memory
from grpo.types import Completion, Request

# Sequences written at once at most. Beyond it a GPU gains little and CUDA graphs cost memory.
MAX_SEQUENCES = 512

# Of the canary, after each of its prompts. All tokens are scored in one step, and most of what they follow is cached.
CANARY_COMPLETIONS, CANARY_TOKENS = 4, 8

# Tokens of prompts read in one step: bounds the memory of activations. Twice as many were no faster (8B, H100).
MAX_BATCHED_TOKENS = 4096

# Batch sizes that CUDA graphs are captured for. A step runs at the next larger one, so a rollout that drains wastes at
# most a third; each costs start-up time and memory.
GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512)

# --rollout-graphs, as vLLM's compilation settings. Compiled, it captures what its code is cut into as well.
GRAPHS = {"decode": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}

# vLLM takes this instead of anything lower, and the log-probabilities would be another distribution's.
LOWEST_TEMPERATURE = 0.01

# Share of the free GPU memory that the KV cache takes at most when no size is given.
KV_SHARE = 0.5
# On a CPU, where free memory is no plan.
KV_BYTES_CPU = 2**30
# Blocks of the cache beside those that the longest sequence fills: one is always kept free, and vLLM rounds.
SPARE_BLOCKS = 4
BLOCK_TOKENS = 128  # of vLLM's largest block


class Link(Protocol):
    """How the policy's weights get to vLLM."""

    arguments: dict[str, Any]  # of vllm.LLM
    lora_request: Any  # what requests must carry
    told: str  # what vLLM samples from, for the user

    def building(self) -> AbstractContextManager[None]:
        """Around the construction of the engine."""
        ...

    def attach(self, llm: Any) -> None:
        """Once, after it: prove or make the connection."""
        ...

    def push(self) -> None:
        """Bring the policy's present weights."""
        ...


class VllmEngine:
    """Samples from a Policy by vLLM."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        canary_prompts: list[list[int]],
        config: Config,
        longest: int,
        note: Callable[[str], object] = print,
    ):
        """canary_prompts: tokens [P] of prompts that the canary's completions are written after; longest: prompt and
        completion together, in tokens; note: told what vLLM samples from.

        Raises:
            UserError: vLLM cannot be had, cannot sample from this policy or at this temperature, or has too little
                memory for one sequence.
        """
        if config.temperature < LOWEST_TEMPERATURE:
            raise UserError(
                f"--temperature is {config.temperature}, but vLLM samples at none below {LOWEST_TEMPERATURE}. "
                "Raise it, or use --engine torch."
            )
        self.policy, self.tokenizer, self.config = policy, tokenizer, config
        self.device = policy.device
        vllm = vllm_compat.import_vllm(self.device)
        self.new_params = vllm.SamplingParams
        with vllm_compat.process_unchanged(self.device):
            self.link, self.llm = self._built(vllm, longest)
            self.on_stream = vllm_compat.OwnStream(self.device, vllm_compat.current_stream(self.device))
        self.undo = vllm_sampled.install()
        try:
            self.link.attach(self.llm)
            self.run = vllm_compat.choose_run(self.llm)
            self.kv_memory = find_kv_memory(self.llm, self._can_release())
            self.awake = True
            with refusal_in_words(policy.source):  # some attention kernels refuse only when they are run
                self.canary = build_canary(
                    self, policy, canary_prompts, CANARY_COMPLETIONS, CANARY_TOKENS, self.choices
                )
        except BaseException:
            self.close()
            raise
        note(f"vllm: {self.link.told}")
        if self._captures() and not vllm_compat.has_graphs(self.llm):
            note(
                "note: vLLM captures no decode steps as CUDA graphs with this GPU's attention, which makes sampling "
                "slower. --rollout-graphs compiled captures what it can."
            )

    def _built(self, vllm: Any, longest: int) -> tuple[Link, Any]:
        """vLLM over the policy's weights; where it builds this model otherwise, over its own."""
        link: Link = SharedLink(self.policy)
        llm, why = self._over(link, vllm, longest)
        if llm is None:
            link = build_adapter_link(self.policy, why)
            llm, _ = self._over(link, vllm, longest)
        return link, llm

    def _over(self, link: Link, vllm: Any, longest: int) -> tuple[Any, str]:
        """vLLM, or None and why not over this link."""
        from grpo.rollout.vllm_weights import NotShareableError

        warm_up = vllm_compat.warmed_up_with(self._params(max_tokens=2, seed=0))
        try:
            with refusal_in_words(self.policy.source), link.building(), warm_up:
                vllm_compat.load_model_class(self.policy.source)
                return vllm.LLM(**link.arguments, **self._arguments(longest)), ""
        except NotShareableError as why:
            vllm_compat.clean_up()
            return None, str(why)

    def sample(self, requests: list[Request], finished: Finished = nobody) -> list[Completion]:
        """See Engine.sample."""
        completions: dict[int, Completion] = {}

        def take(index: int, written: vllm_compat.Sampled) -> None:
            version = self.policy.version
            completion = completion_of(written.tokens, written.logprobs, written.stopped, self.tokenizer, version)
            completions[index] = completion
            finished(index, completion)

        params = [self._params(request.max_tokens, request.seed) for request in requests]
        self._run([request.context for request in requests], params, take)
        return [completions[index] for index in range(len(requests))]

    def logprobs(self, contexts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """See Engine.logprobs. A request for each token, which is asked for by name after what comes before it."""
        cases = [
            (context + completion[:position], token)
            for context, completion in zip(contexts, completions, strict=True)
            for position, token in enumerate(completion)
        ]
        params = [self._params(1, seed=0, logprob_token_ids=[token]) for _, token in cases]
        answers = iter(self._run([tokens for tokens, _ in cases], params))
        return [[next(answers).logprob_of(token) for token in completion] for completion in completions]

    def choices(self, context: list[int], completion: list[int]) -> torch.Tensor | None:
        """The experts that vLLM's routers chose at each token but the last, [T, layers that have some, k], in a request
        by itself, whose rows are its tokens. None where that cannot be seen: vLLM has experts of its own, or replays
        what it captured."""
        tokens = context + completion[:-1]
        with self.on_stream():
            self.llm.reset_prefix_cache()  # what is cached is not computed
        with watched(experts_in(self.policy.model)) as seen:
            self._run([tokens], [self._params(1, seed=0)])
        chosen = together(seen)
        return None if chosen is None or len(chosen) < len(tokens) else chosen[: len(tokens)]

    def take_up(self) -> None:
        """See Engine.take_up."""
        self._wake()
        with self.on_stream():
            self.link.push()
            self.llm.reset_prefix_cache()

    def sync(self) -> dict[str, float]:
        """See Engine.sync."""
        self.take_up()
        return self.canary.check()

    def release(self) -> None:
        """See Engine.release."""
        if self.awake:
            with self.on_stream():
                self.kv_memory.release()
            self.awake = False

    def close(self) -> None:
        """See Engine.close. Nothing may refer to vLLM's memory any more when it is freed."""
        with vllm_compat.process_unchanged(self.device), self.on_stream():
            self.undo()
            for name in ("run", "kv_memory", "link"):
                self.__dict__.pop(name, None)
            vllm_compat.shut_down(self.__dict__.pop("llm"))

    def _wake(self) -> None:
        if not self.awake:
            with self.on_stream():
                self.kv_memory.restore()
            self.awake = True

    def _run(
        self, prompts: list[list[int]], params: list[Any], done: vllm_compat.Done = vllm_compat.nobody
    ) -> list[vllm_compat.Sampled]:
        self._wake()
        # On a CPU vLLM draws from the global generator, even for requests that have their own.
        with self.on_stream(), torch.random.fork_rng(devices=[]):
            return self.run(prompts, params, self.link.lora_request, done)

    def _params(self, max_tokens: int, seed: int, **asked: Any) -> Any:
        return self.new_params(
            max_tokens=max_tokens,
            temperature=self.config.temperature,
            seed=seed,
            stop_token_ids=self.policy.stop_tokens,
            detokenize=False,
            **(asked or {"logprobs": 0, "flat_logprobs": True}),
        )

    def _can_release(self) -> bool:
        return self.config.release_kv_cache and self.device.type == "cuda"

    def _captures(self) -> bool:
        return self.config.rollout_graphs != "none" and self.device.type == "cuda"

    def _arguments(self, longest: int) -> dict[str, Any]:
        """Of vllm.LLM, but for the link's."""
        config, dtype = self.config, self.policy.store.compute_dtype
        sequences = sequences_at_once(config)
        sizes = [size for size in GRAPH_SIZES if size < sequences] + [sequences]
        compilation = {"cudagraph_capture_sizes": sizes} | GRAPHS.get(config.rollout_graphs, {})
        return {
            "model": self.policy.source,
            "skip_tokenizer_init": True,
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": longest,
            "max_num_seqs": sequences,
            "kv_cache_memory_bytes": self._kv_bytes(sequences, longest),
            "enable_prefix_caching": True,
            "enable_sleep_mode": self._can_release(),
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "enforce_eager": not self._captures(),
            "seed": config.seed,
            **({"compilation_config": compilation} if self._captures() else {}),
            **(_gpu_arguments() if self.device.type == "cuda" else _cpu_arguments(longest)),
        }

    def _kv_bytes(self, sequences: int, longest: int) -> int:
        """What was asked for; else what all sequences at full length need, within bounds.

        Raises:
            UserError: it holds less than one sequence.
        """
        per_token = kv_bytes_per_token(self.policy.source, self.policy.store.compute_dtype)
        if self.config.kv_cache_gib:
            given = int(self.config.kv_cache_gib * 2**30)
            origin = f"--kv-cache-gib is {self.config.kv_cache_gib:g}"
        else:
            bound = KV_SHARE * torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else KV_BYTES_CPU
            given = int(min(full_cache_bytes(sequences, longest, per_token), bound))
            origin = f"{given / 2**30:.2f} GiB of memory are left for vLLM's KV cache"
        least = (math.ceil(longest / BLOCK_TOKENS) + SPARE_BLOCKS) * BLOCK_TOKENS * per_token
        if given < least:
            raise UserError(
                f"{origin}, but one sequence of {longest} tokens needs {least / 2**30:.2g} GiB there. Allow more by "
                "--kv-cache-gib, or lower --max-completion-tokens or --max-context."
            )
        return given


class SharedLink:
    """vLLM multiplies by the trainer's own tensors, so there is nothing to bring."""

    lora_request = None
    told = "samples from the trainer's own weights, base and adapter"

    def __init__(self, policy: Policy):
        from grpo.rollout import vllm_weights

        self.weights, self.policy = vllm_weights, policy
        self.arguments = {
            "quantization": vllm_weights.SHARED,
            "load_format": vllm_weights.SHARED,
            # vLLM keeps compiled code on disk and knows nothing of our tensors: without this, code compiled over a bf16
            # base would be run over an NF4 base of the same model.
            "additional_config": {"grpo": vllm_weights.layout_key(policy.model, policy.store)},
            **vllm_weights.text_alone(policy.model, policy.source),
        }

    def building(self) -> AbstractContextManager[None]:
        """See Link.building."""
        vllm_compat.exempt_from_compilation(self.policy.model)
        return self.weights.lending(self.policy.model, self.policy.store, self.policy.conv1d)

    def attach(self, llm: Any) -> None:
        """See Link.attach."""
        self.weights.check_shared(vllm_compat.inner_model(llm), self.policy.model, self.policy.store)

    def push(self) -> None:
        """See Link.push. The optimizer step has already refreshed the mirrors, and they are what vLLM reads."""


def build_adapter_link(policy: Policy, why: str) -> Link:
    """vLLM's own weights and LoRA. why: its layers cannot be the trainer's, a clause."""
    from grpo.rollout.vllm_adapter import AdapterLink

    return AdapterLink(policy, why)


@contextmanager
def refusal_in_words(source: str) -> Iterator[None]:
    """Inside, what vLLM raises about a model that it does not know or cannot run here is told as a sentence.

    Raises:
        UnsuitedEngine: it did.
    """
    try:
        yield
    except (ValueError, KeyError, AssertionError, NotImplementedError, RuntimeError) as error:
        # Memory that ran out has a sentence of its own (grpo/guards.py); after a fault of the GPU no engine would work.
        if is_out_of_memory(error) or "CUDA error" in str(error):
            raise
        raise UnsuitedEngine(
            f"vLLM cannot sample from {source} with an adapter: {vllm_compat.reason_of(error)} Use --engine torch."
        ) from error


def sequences_at_once(config: Config) -> int:
    """How many vLLM writes side by side."""
    rollout = config.prompts_per_step * config.group_size
    wanted = min(MAX_SEQUENCES, max(rollout, config.eval_prompts * config.eval_samples))
    return min(wanted, config.max_num_seqs or wanted)


def _gpu_arguments() -> dict[str, Any]:
    """A longer prompt is read in pieces. vLLM refuses to start unless a share of the GPU is free; the KV cache's size
    is given in bytes."""
    free, total = torch.cuda.mem_get_info()
    return {"max_num_batched_tokens": MAX_BATCHED_TOKENS, "gpu_memory_utilization": 0.95 * free / total}


def _cpu_arguments(longest: int) -> dict[str, Any]:
    """A prompt read in two steps would have its seeded generator set back, which vLLM cannot do on a CPU."""
    return {"max_num_batched_tokens": max(MAX_BATCHED_TOKENS, longest), "enable_chunked_prefill": False}
