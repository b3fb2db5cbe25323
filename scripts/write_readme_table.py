"""Writes the figures of README.md from benchmarks/results/*.json. Knows nothing of how they were measured.

python scripts/write_readme_table.py           rewrite what stands between the two markers
python scripts/write_readme_table.py --check   fail if that would change anything
"""

import json
import sys
from pathlib import Path
from typing import Any

from learning_table import learning, percent

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures begin: python scripts/write_readme_table.py -->", "<!-- figures end -->"

# Rows of the kernel results that README shows: (operation, shape).
HEADLINES = (
    ("linear_logprob forward + backward", "8192 x 4096 x 128256"),
    ("linear_logprob no gradient", "8192 x 4096 x 128256"),
    ("lora_mlp silu forward + backward", "8192 x 4096 / 14336"),
)


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    figures = "\n\n".join(part for part in (embedded(), learning(RESULTS), rollouts(), kernels()) if part)
    written = f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}"
    if "--check" in sys.argv[1:]:
        sys.exit(f"{README} is older than the results; run python {Path(__file__).name}" if written != text else 0)
    README.write_text(written)


def embedded() -> str:
    """The default run, a line a seed."""
    result = json.loads((RESULTS / "embedded-cpu.json").read_text())
    machine = result["machine"]
    lines = [
        f"| {row['seed']} | {percent(row['before'])} | {percent(row['after'])} | "
        f"{100 * (row['after'][0] - row['before'][0]):+.1f} | {row['steps']} | {row['seconds']:.0f} |"
        for row in result["rows"]
    ]
    return (
        f"The default run on {machine['cores']} cores of an {machine['processor']} CPU, torch {machine['torch']}, "
        f"{machine['date']} (`{machine['command']}`): held-out pass@1 with its 95% interval, and the seconds of the "
        "whole command.\n\n| seed | before | after | points | steps | seconds |\n|---:|---|---|---:|---:|---:|\n"
        + "\n".join(lines)
    )


ENGINES = {
    "ours-bf16": "**ours**, bf16 base shared with the trainer, LoRA",
    "ours-nf4": "**ours**, NF4 base shared with the trainer, LoRA",
    "lora": "vLLM's own LoRA, bf16",
    "bnb-lora": "vLLM's bitsandbytes NF4 and LoRA",
    "plain": "vLLM without LoRA, bf16",
}


def rollouts() -> str:
    """Engines side by side, on each GPU that was measured."""
    tables = []
    for path in sorted(RESULTS.glob("rollout-*.json")):
        result = json.loads(path.read_text())
        about, cases = result["about"], result["cases"]
        lines = [rollout_line(case, row) for case, row in cases.items() if "tokens_per_s" in row]
        origin = (
            f"Rollouts on one {about['device']}, vLLM {about['vllm']}: {about['prompts']} prompts of "
            f"{about['prompt_tokens']} tokens, {about['group_size']} completions of {about['completion_tokens']}, LoRA "
            f"rank {about['lora_rank']}, log-probabilities kept (`{about['command']}`). Gap: mean |log p of the "
            "sampler - log p of the policy that is trained|, for plain vLLM that of transformers in bf16. Memory: of "
            f"the whole process, policy and optimizer included, {about['kv_cache_gib']:g} GiB of it the KV cache. "
            "Start: with nothing compiled yet. Both where nothing else is said. Ratios hold within a run."
        )
        header = (
            "| shape | engine | run | tokens/s | gap | memory, GiB | start, s |\n|---|---|---:|---:|---:|---:|---:|"
        )
        tables.append("\n".join([origin, "", header, *lines]))
    return "\n\n".join(tables)


def rollout_line(case: str, row: dict[str, Any]) -> str:
    shape, engine, *cache = case.split("/")
    name = ENGINES[engine] + "".join(f", {size} of KV cache" for size in cache)
    gap = row.get("gap", {})
    value = gap.get("random_adapter", gap.get("transformers"))
    shown = "" if value is None else f"{value:.3f}"
    return (
        f"| {shape} | {name} | {row['run']} | {row['tokens_per_s']:,} | {shown} | {row['after_rollouts_gib']:.1f} "
        f"| {row['startup_s']:.0f}{', compiled before' if row.get('compiled_before') else ''} |"
    )


def kernels() -> str:
    """The LM head and the MLP against their rivals, on each GPU that was measured."""
    tables = []
    for path in sorted(RESULTS.glob("kernels-*.json")):
        result = json.loads(path.read_text())
        rows = [row for row in result["rows"] if (row["operation"], row["shape"]) in HEADLINES and not row["skipped"]]
        lines = "\n".join(map(kernel_line, rows))
        machine = result["machine"]
        origin = (
            "The LM head (tokens x hidden x vocabulary) and the MLP over an NF4 base with LoRA (tokens x hidden / "
            f"inner) on one {machine['gpu']}, bfloat16, as a multiple of their plain matrix products, one and six, in "
            f"the same run (`{machine['command']}`; all: [kernels/README.md](kernels/README.md))."
        )
        header = "| operation | shape | | × products | peak GiB |\n|---|---|---|---:|---:|"
        tables.append(f"{origin}\n\n{header}\n{lines}")
    return "\n\n".join(tables)


def kernel_line(row: dict[str, Any]) -> str:
    name = f"**{row['entry']}**" if row["entry"].startswith("ours") else row["entry"]
    return f"| {row['operation']} | {row['shape']} | {name} | {row['ratio']:.2f} | {row['peak_gib']:.2f} |"


if __name__ == "__main__":
    main()
