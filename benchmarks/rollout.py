"""Rollout speed, memory and exactness of the vLLM engine over shared weights, beside vLLM's own ways, in one run.

    python benchmarks/rollout.py            all cases; writes benchmarks/results/rollout-<gpu>.json
    python benchmarks/rollout.py --only qwen3-1.7b/ours-bf16 --profile

Models have the true shapes and random weights (speed and memory do not depend on values), written to --folder once.
Each case is a process of its own. 32 prompts of 128 tokens, 8 completions of 512 each, nothing stops early.

    ours-bf16, ours-nf4    VllmEngine over a policy with LoRA r=32 on every linear layer, log-probabilities kept
    plain                  vLLM, bf16, no LoRA
    lora                   vLLM, bf16, its own LoRA r=32
    bnb-lora               vLLM, bitsandbytes NF4, its own LoRA r=32

Rivals are asked for log-probabilities in the same way (`processed_logprobs`, flat, not detokenised).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import cases
import torch
import transformers
from profiling import profile
from shapes import SHAPES, model_folder

PROMPTS, GROUP, PROMPT_TOKENS, COMPLETION_TOKENS = 32, 8, 128, 512
GAP_SEQUENCES, GAP_TOKENS = 16, 64
RANK = 32
KV_GIB = 16.0

CASES = (
    "qwen3-1.7b/ours-bf16", "qwen3-1.7b/ours-nf4", "qwen3-1.7b/plain", "qwen3-1.7b/lora", "qwen3-1.7b/bnb-lora",
    "qwen3-0.6b/ours-bf16", "qwen3-0.6b/ours-nf4",
    "llama-3.1-8b/ours-bf16", "llama-3.1-8b/ours-nf4", "llama-3.1-8b/bnb-lora",
)  # fmt: skip

KNOWN = [f"{shape}/{kind}" for shape in SHAPES for kind in ("ours-bf16", "ours-nf4", "plain", "lora", "bnb-lora")]


def main() -> None:
    """Run the cases, each in its own process, and keep what they measured."""
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.case:
        cases.answer({}, lambda: measure(arguments))
    names = cases.chosen(parser, arguments.only, CASES, KNOWN)
    device, found = cases.device_name(arguments.device), cases.versions()
    about = {
        "command": "python benchmarks/rollout.py", "device": device, "torch": found["torch"],
        "vllm": found.get("vllm", "none"), "prompts": PROMPTS, "group_size": GROUP, "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": COMPLETION_TOKENS, "lora_rank": RANK, "kv_cache_gib": KV_GIB,
    }  # fmt: skip
    results = cases.Results(cases.results_path(arguments.out, "rollout", device), about)
    lengths = {"kv-gib": (arguments.kv_gib, KV_GIB), "tokens": (arguments.tokens, COMPLETION_TOKENS)}
    shown = [word for name, (value, usual) in lengths.items() if value != usual for word in (f"--{name}", f"{value:g}")]
    variant = "" if arguments.kv_gib == KV_GIB else f"/{arguments.kv_gib:g} GiB"
    variant += "" if arguments.tokens == COMPLETION_TOKENS else f"/tokens={arguments.tokens}"
    hidden = ["--profile"] if arguments.profile else []
    sys.exit(cases.Benchmark(arguments, results, needs, in_a_line, shown, hidden, variant).run(names))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_arguments(parser, example="qwen3-1.7b/ours-nf4")
    parser.add_argument("--kv-gib", type=float, default=KV_GIB)
    parser.add_argument("--tokens", type=int, default=COMPLETION_TOKENS, help="of each completion")
    parser.add_argument("--profile", action="store_true", help="also say where a decode step's time goes")
    return parser


def needs(case: str) -> tuple[str, bool]:
    """The checkpoint of a case: all begin with one in bf16."""
    return case.split("/")[0], False


def in_a_line(record: cases.Record) -> str:
    """What was found, for the terminal."""
    return ", ".join(f"{name} {value}" for name, value in record.items() if isinstance(value, float | int))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One case."""
    _, kind = arguments.case.split("/")
    start = time.perf_counter()
    folder = model_folder(*needs(arguments.case), arguments.folder)
    result = (measure_ours if kind.startswith("ours") else measure_vllm)(kind, folder, arguments)
    return result | {"case_s": round(time.perf_counter() - start, 1)}


def prompts(seed: int, count: int, vocabulary: int) -> list[list[int]]:
    """Random token ids, so that no prompt is in the cache."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, vocabulary - 10, (count, PROMPT_TOKENS), generator=generator).tolist()


def used_gib() -> float:
    """What the whole GPU holds now, contexts included."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Any, repeats: int = 1) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# ---- ours


class NoText:
    """Random tokens have no text."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        """Nothing."""
        return ""


def measure_ours(kind: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """VllmEngine over a policy."""
    from grpo.config import Config
    from grpo.policy import Policy
    from grpo.policy.load import choose_device, load_model
    from grpo.rollout.sampling import sample_groups
    from grpo.rollout.vllm_engine import VllmEngine
    from grpo.types import Prompt

    before = used_gib()
    longest = PROMPT_TOKENS + arguments.tokens
    config = Config(
        model=str(folder), base=kind.removeprefix("ours-"), engine="vllm", prompts_per_step=PROMPTS, group_size=GROUP,
        max_completion_tokens=arguments.tokens, eval_prompts=PROMPTS, eval_samples=4, lora_rank=RANK, lora_alpha=RANK,
        kv_cache_gib=arguments.kv_gib,
    )  # fmt: skip
    policy = Policy(load_model(config, choose_device(config), longest), config)
    policy.stop_tokens = []
    vocabulary = policy.model.head.shape[0]
    torch.cuda.empty_cache()
    memory = {"policy_gib": used_gib() - before}

    def ask(seed: int, count: int = PROMPTS) -> list[Prompt]:
        return [Prompt(i, "", tokens, {}) for i, tokens in enumerate(prompts(seed, count, vocabulary))]

    start = time.perf_counter()
    engine = VllmEngine(policy, NoText(), [prompt.tokens for prompt in ask(0)], config, longest)
    startup = time.perf_counter() - start
    memory["with_engine_gib"] = used_gib() - before
    speeds = []
    for seed in (1, 2, 3):
        seconds = timed(lambda seed=seed: sample_groups(engine, ask(seed), GROUP, arguments.tokens, seed))
        speeds.append(PROMPTS * GROUP * arguments.tokens / seconds)
    memory["after_rollouts_gib"] = used_gib() - before
    if arguments.profile:
        profile(lambda: sample_groups(engine, ask(4), GROUP, arguments.tokens, 4), arguments.tokens)

    gaps = {"fresh": gap(engine, policy, ask(5, GAP_SEQUENCES))}
    generator = torch.Generator(policy.device).manual_seed(0)
    with torch.no_grad():
        for parameter in policy.store.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    policy.store.refresh()
    policy.version += 1
    synced = engine.sync()
    gaps["random_adapter"] = gap(engine, policy, ask(6, GAP_SEQUENCES))
    release, restore = timed(engine.release), timed(engine._wake)
    gaps["after_sleep"] = gap(engine, policy, ask(7, GAP_SEQUENCES))
    return {
        "tokens_per_s": round(statistics.median(speeds[1:])),
        "ms_per_step": round(1e3 * PROMPTS * GROUP / statistics.median(speeds[1:]), 2),
        "startup_s": round(startup, 1),
        "gap": gaps,
        "sync_gap": synced["sync/gap"],
        "sync_moved": synced["sync/moved"],
        "canary_bound": engine.canary.bound,
        "refresh_ms": round(1e3 * timed(policy.store.refresh, 10), 3),
        "take_up_ms": round(1e3 * timed(engine.take_up, 10), 3),
        "sync_with_canary_ms": round(1e3 * timed(engine.canary.check, 10), 1),
        "release_ms": round(1e3 * release, 1),
        "restore_ms": round(1e3 * restore, 1),
        **{name: round(value, 2) for name, value in memory.items()},
    }


def gap(engine: Any, policy: Any, asked: list[Any]) -> float:
    """Mean |log p of the sampler - log p of the policy| over sampled tokens."""
    from grpo.packing import lay_out_to_read
    from grpo.rollout.sampling import sample_groups

    for_all = sample_groups(engine, asked, 1, GAP_TOKENS, seed=7)
    batch = lay_out_to_read(for_all, policy.device)
    difference = (policy.logprobs(batch)[0].detach() - batch.sampler_logprobs)[batch.mask]
    return float(difference.abs().mean())


# ---- vLLM's own ways


def measure_vllm(kind: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """vLLM with its own weights, with or without its own LoRA."""
    import vllm
    from vllm.lora.request import LoRARequest

    before = used_gib()
    settings = transformers.AutoConfig.from_pretrained(folder)
    lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": RANK} if "lora" in kind else {}
    quantized = {"quantization": "bitsandbytes"} if "bnb" in kind else {}
    start = time.perf_counter()
    llm = vllm.LLM(
        str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=PROMPT_TOKENS + arguments.tokens,
        max_num_seqs=PROMPTS * GROUP, max_num_batched_tokens=8192, gpu_memory_utilization=0.9,
        kv_cache_memory_bytes=int(arguments.kv_gib * 2**30), logprobs_mode="processed_logprobs",
        generation_config="vllm", compilation_config={"cudagraph_capture_sizes": [1, 8, 64, 128, 256]}, **lora,
        **quantized,
    )  # fmt: skip
    startup = time.perf_counter() - start
    request = LoRARequest("adapter", 1, write_adapter(folder, settings)) if lora else None

    def generate(seed: int, count: int, group: int, tokens: int) -> list[Any]:
        params = vllm.SamplingParams(
            n=group, max_tokens=tokens, temperature=1.0, ignore_eos=True, detokenize=False, logprobs=0,
            flat_logprobs=True,
        )  # fmt: skip
        wrapped = [vllm.inputs.TokensPrompt(prompt_token_ids=p) for p in prompts(seed, count, settings.vocab_size)]
        return llm.generate(wrapped, params, use_tqdm=False, lora_request=request)

    speeds = []
    for seed in (1, 2, 3):
        seconds = timed(lambda seed=seed: generate(seed, PROMPTS, GROUP, arguments.tokens))
        speeds.append(PROMPTS * GROUP * arguments.tokens / seconds)
    memory = used_gib() - before
    gaps = (
        {} if lora else {"gap": {"transformers": transformers_gap(generate(5, GAP_SEQUENCES, 1, GAP_TOKENS), folder)}}
    )
    return {
        "tokens_per_s": round(statistics.median(speeds[1:])),
        "ms_per_step": round(1e3 * PROMPTS * GROUP / statistics.median(speeds[1:]), 2),
        "startup_s": round(startup, 1),
        "after_rollouts_gib": round(memory, 2),
        **gaps,
    }


def write_adapter(folder: Path, settings: Any) -> str:
    """A PEFT adapter of rank 32 on all linear layers."""
    from peft import LoraConfig, get_peft_model

    target = folder.parent / f"{folder.name}-adapter"
    shutil.rmtree(target, ignore_errors=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.01)
    model.save_pretrained(target)
    return str(target)


@torch.no_grad()
def transformers_gap(outputs: list[Any], folder: Path) -> float:
    """Mean |log p of vLLM - log p of transformers|, both in bf16, over what vLLM sampled."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    total = 0.0
    for output in outputs:
        answer = output.outputs[0]
        tokens = torch.tensor([output.prompt_token_ids + list(answer.token_ids)], device=model.device)
        logprobs = model(tokens).logits[0, PROMPT_TOKENS - 1 : -1].float().log_softmax(-1)
        theirs = logprobs.gather(1, tokens[0, PROMPT_TOKENS:, None]).squeeze(1).cpu()
        total += float((theirs - torch.tensor(list(answer.logprobs.logprobs))).abs().mean())
    return total / len(outputs)


if __name__ == "__main__":
    main()
