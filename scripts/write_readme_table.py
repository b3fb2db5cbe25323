"""Writes the figures of README.md (one table), of docs/speed.md and docs/memory.md (those that matter) and of
docs/figures.md (all) from benchmarks/results/*.json.

Knows nothing of how they were measured.

python scripts/write_readme_table.py           rewrite what stands between the pages' markers, and docs/figures.md
python scripts/write_readme_table.py --check   fail if that would change anything
"""

import json
import sys
from pathlib import Path
from typing import Any

from learning_table import learning, learning_in_short, percent
from step_table import company, lessons, memory, steps, steps_in_short, whole_steps

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SPEED, MEMORY, FIGURES = (ROOT / "docs" / f"{name}.md" for name in ("speed", "memory", "figures"))
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures begin: python scripts/write_readme_table.py -->", "<!-- figures end -->"

RUN_BEGIN, RUN_END = "<!-- run begin: python benchmarks/embedded.py -->", "<!-- run end -->"

BUSY = 0.25  # processes of others a core, from which seconds are not those of an idle machine

# Rows of the kernel results that are shown outside of kernels/README.md: (operation, shape).
HEADLINES = (
    ("linear_logprob forward + backward", "8192 x 4096 x 128256"),
    ("linear_logprob no gradient", "8192 x 4096 x 128256"),
    ("lora_mlp silu forward + backward", "8192 x 4096 / 14336"),
)
# Rollouts that docs/speed.md shows: the largest model, and the one that rivals were measured on.
SHAPES_IN_SHORT = ("llama-3.1-8b", "qwen3-1.7b")

ABOUT = """# Figures

<!-- written by python scripts/write_readme_table.py from benchmarks/results -->

Every figure with the machine and the command that gave it. Kernels one by one:
[kernels/README.md](../kernels/README.md). How they came about, and what was tried without success:
[LOG.md](../LOG.md)."""


def main() -> None:
    text = between(README.read_text(), BEGIN, whole_steps(RESULTS), END)
    if printed := what_a_run_showed():
        text = between(text, RUN_BEGIN, printed, RUN_END)
    written = {README: text, FIGURES: everything() + "\n"}
    written[SPEED] = between(SPEED.read_text(), BEGIN, speed(), END)
    written[MEMORY] = between(MEMORY.read_text(), BEGIN, memory(RESULTS), END)
    if "--check" in sys.argv[1:]:
        old = [str(path) for path, text in written.items() if not path.exists() or path.read_text() != text]
        sys.exit(f"{', '.join(old)} older than the results; run python {Path(__file__).name}" if old else 0)
    for path, text in written.items():
        path.write_text(text)


def between(text: str, begin: str, new: str, end: str) -> str:
    """The text with something new between two markers."""
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


def what_a_run_showed() -> str:
    """The terminal of the default run, if its benchmark kept it."""
    result = json.loads((RESULTS / "embedded-cpu.json").read_text())
    row = next((row for row in result["rows"] if "shown" in row), None)
    if row is None:
        return ""
    command = f"python -m grpo.run tasks/gsm8k.py --seed {row['seed']}"
    cores = result["machine"]["cores"]
    return f"From `{command}` on {cores} CPU cores, every tenth step shown:\n\n```\n{row['shown']}\n```"


def speed() -> str:
    """docs/speed.md: steps beside their rivals and their parts, the default run, learning, rollouts, kernels."""
    sections = {
        "Whole steps": steps_in_short(RESULTS),
        "On a CPU": embedded(),
        "A run that learns, on a GPU": learning_in_short(RESULTS),
        "Rollouts": rollouts(in_short=True),
        "Kernels": kernels(in_short=True),
    }
    return joined(*(f"### {title}\n\n{text}" for title, text in sections.items() if text))


def everything() -> str:
    """docs/figures.md."""
    sections = {
        "Whole steps": steps(RESULTS),
        "SFT and DPO": lessons(RESULTS),
        "Memory": memory(RESULTS),
        "The default run": embedded(),
        "Learning on a GPU": learning(RESULTS),
        "Rollouts": rollouts(in_short=False),
        "Head and MLP": kernels(in_short=False),
        "Is the engine the policy": canary(),
    }
    return joined(ABOUT, *(f"## {title}\n\n{text}" for title, text in sections.items() if text))


def joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def embedded() -> str:
    """The default run, a line a seed."""
    result = json.loads((RESULTS / "embedded-cpu.json").read_text())
    machine = result["machine"]
    lines = [
        f"| {row['seed']} | {percent(row['before'])} | {percent(row['after'])} | "
        f"{100 * (row['after'][0] - row['before'][0]):+.1f} | {row['steps']} | {row['seconds']:.0f} |"
        for row in result["rows"]
    ]
    load = machine.get("load", 0)
    busy = f" that others kept busy too (load average {load:g})" if load > BUSY * machine["cores"] else ""
    return (
        f"The default run on {machine['cores']} cores of an {machine['processor']} CPU{busy}, torch "
        f"{machine['torch']}, {machine['date']} (`{machine['command']}`): held-out pass@1 with its 95% interval, and "
        "the seconds of the whole command.\n\n"
        "| seed | before | after | points | steps | seconds |\n|---:|---|---|---:|---:|---:|\n" + "\n".join(lines)
    )


def canary() -> str:
    """The canary and the audit in low precision, on each GPU that was measured."""
    return joined(*(canary_on(json.loads(path.read_text())) for path in sorted(RESULTS.glob("canary-*.json"))))


def canary_on(result: dict[str, Any]) -> str:
    """A line for each engine and learning rate."""
    about, lines = result["about"], []
    for name, case in result["cases"].items():
        if "failed" in case:
            continue
        for honest in case["honest"]:
            is_last = honest is case["honest"][-1]
            cells = [name, f"{case['prompts'] * about['group_size']} x {case['tokens']}", f"{case['noise']:.3g}"]
            cells += [f"{honest['rate']:g}", str(honest["steps"]), "**yes**" if honest["alarm"] else "none"]
            cells += [f"{honest['largest_gap']:.3f}", f"{honest['mean_rank']:.3f}"]
            cells += [how_soon(case.get(what)) if is_last else "" for what in ("stale", "greedy", "top 20")]
            cells += [f"{honest[stage]:.2f}" for stage in ("step_s", "sync_s", "audit_s")]
            lines.append("| " + " | ".join(cells) + " |")
    shown = next(iter(result["cases"].values()))
    return (
        f"Random weights and rewards, on one {about['device']} (`{about['command']}`; each case's own command and date "
        "stand in its record). So many honest steps at each learning rate, and whether one of them raised an alarm; "
        f"then the canary was answered by an engine that stood still while the policy learned at "
        f"{shown['stale_rate']:g}, and the audit was given tokens drawn greedily, or from the 20 likeliest: steps "
        "until each was found. Noise and gap in nats; rank 0.5 is right; seconds of a step, of them sync with canary, "
        f"and audit.{company(result['cases'].values())}\n\n"
        "| case | completions | noise | rate | honest steps | alarm | largest gap | mean rank | stale found | "
        "greedy found | top 20 found | step | sync | audit |\n"
        "|---|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|\n" + "\n".join(lines)
    )


def how_soon(found: dict[str, Any] | None) -> str:
    """Steps that it took; empty where it was not tried."""
    return "" if found is None else str(found["steps"] or f"not in {found['tried']}")


ENGINES = {
    "ours-bf16": "**ours**, bf16 base shared with the trainer, LoRA",
    "ours-nf4": "**ours**, NF4 base shared with the trainer, LoRA",
    "lora": "vLLM's own LoRA, bf16",
    "bnb-lora": "vLLM's bitsandbytes NF4 and LoRA",
    "plain": "vLLM without LoRA, bf16",
}


def rollouts(in_short: bool) -> str:
    """Engines side by side, on each GPU that was measured."""
    tables = []
    for path in sorted(RESULTS.glob("rollout-*.json")):
        result = json.loads(path.read_text())
        cases = {case: row for case, row in result["cases"].items() if "tokens_per_s" in row}
        tables.append(rollouts_in_short(result["about"], cases) if in_short else all_rollouts(result["about"], cases))
    return joined(*tables)


def all_rollouts(about: dict[str, Any], cases: dict[str, Any]) -> str:
    origin = (
        f"Rollouts on one {about['device']}, vLLM {about['vllm']}: {about['prompts']} prompts of "
        f"{about['prompt_tokens']} tokens, {about['group_size']} completions of {about['completion_tokens']}, LoRA "
        f"rank {about['lora_rank']}, log-probabilities kept (`{about['command']}`). Gap: mean |log p of the "
        "sampler - log p of the policy that is trained|, for plain vLLM that of transformers in bf16. Memory: of "
        f"the whole process, policy and optimizer included, {about['kv_cache_gib']:g} GiB of it the KV cache. "
        "Start: with nothing compiled yet. Both where nothing else is said. Ratios hold within a run."
    )
    header = "| shape | engine | run | tokens/s | gap | memory, GiB | start, s |\n|---|---|---:|---:|---:|---:|---:|"
    return "\n".join([origin, "", header, *(rollout_line(case, row) for case, row in cases.items())])


def engine_of(case: str) -> str:
    """Who samples, and what was not as usual."""
    _, engine, *variant = case.split("/")
    return ", ".join([ENGINES[engine], *(f"{v} of KV cache" if v.endswith("GiB") else v for v in variant)])


def rollout_line(case: str, row: dict[str, Any]) -> str:
    shape, name = case.split("/")[0], engine_of(case)
    gap = row.get("gap", {})
    value = gap.get("random_adapter", gap.get("transformers"))
    shown = "" if value is None else f"{value:.3f}"
    return (
        f"| {shape} | {name} | {row['run']} | {row['tokens_per_s']:,} | {shown} | {row['after_rollouts_gib']:.1f} "
        f"| {row['startup_s']:.0f}{', compiled before' if row.get('compiled_before') else ''} |"
    )


def rollouts_in_short(about: dict[str, Any], cases: dict[str, Any]) -> str:
    """Tokens a second and memory; an engine beside its rivals of the same run."""
    alone = [s for s in SHAPES_IN_SHORT if not any(c.startswith(s) and "/ours" not in c for c in cases)]
    origin = (
        f"Rollouts on one {about['device']}, vLLM {about['vllm']}: {about['prompts'] * about['group_size']} "
        f"completions of {about['completion_tokens']} tokens, LoRA rank {about['lora_rank']} (`{about['command']}`). "
        f"Memory is that of the whole process, {about['kv_cache_gib']:g} GiB of it KV cache where nothing else is "
        "said. Ratios hold within a run."
        + "".join(f" No rival was measured at the shape of {shape}." for shape in alone)
    )
    header = "| shape | engine | run | tokens/s | memory, GiB |\n|---|---|---:|---:|---:|"
    lines = []
    for shape in SHAPES_IN_SHORT:
        for case, row in cases.items():
            if case.startswith(f"{shape}/"):
                numbers = f"{row['run']} | {row['tokens_per_s']:,} | {row['after_rollouts_gib']:.1f}"
                lines.append(f"| {shape} | {engine_of(case)} | {numbers} |")
    return "\n".join([origin, "", header, *lines])


def kernels(in_short: bool) -> str:
    """The LM head and the MLP against their rivals, on each GPU that was measured."""
    tables = []
    for path in sorted(RESULTS.glob("kernels-*.json")):
        result = json.loads(path.read_text())
        rows = [row for row in result["rows"] if (row["operation"], row["shape"]) in HEADLINES and not row["skipped"]]
        if not rows:
            continue
        if in_short:  # variants of ours are told apart by a comma
            rows = [row for row in rows if not row["entry"].startswith("ours,")]
        lines = "\n".join(map(kernel_line, rows))
        machine = result["machine"]
        origin = (
            "The LM head (tokens x hidden x vocabulary) and the MLP over an NF4 base with LoRA (tokens x hidden / "
            f"inner) on one {machine['gpu']}, bfloat16, as a multiple of their plain matrix products, one and six, in "
            f"the same run (`{machine['command']}`)."
        )
        header = "| operation | shape | | × products | peak GiB |\n|---|---|---|---:|---:|"
        tables.append(f"{origin}\n\n{header}\n{lines}")
    return joined(*tables)


def kernel_line(row: dict[str, Any]) -> str:
    name = f"**{row['entry']}**" if row["entry"].startswith("ours") else row["entry"]
    return f"| {row['operation']} | {row['shape']} | {name} | {row['ratio']:.2f} | {row['peak_gib']:.2f} |"


if __name__ == "__main__":
    main()
