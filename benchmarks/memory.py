"""The most memory that whole runs of ours take, vLLM included, beside what they are allowed and what is predicted.

    python benchmarks/memory.py            all cases; writes benchmarks/results/memory-<gpu>.json
    python benchmarks/memory.py --only llama-3.1-8b/8x20256 --deadline 540
    python benchmarks/memory.py --only tiny/2x64 --device cpu      tries the script

Each case is a process of its own that runs a few steps of the product's loop (our_run.py) over random weights in NF4:
one prompt and so many completions of one length, or the usual step of step.py (64x768). Where there is a limit the run
is told (--memory-gib); whether the process stayed below it is seen from outside, for vLLM's KV cache and CUDA's own
memory are not torch's. Of long contexts only the first tokens are sampled and the rest is made up (our_run.Lengthened):
the engine holds its whole cache from the start, and the update reads full lengths. The peak is the GPU's as nvidia-smi
sees it, less what was taken before; what is predicted is the run's own plan (grpo/memory.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass

import cases
from our_settings import add_settings, fields_of, settings_of
from shapes import model_folder
from work import RANK

STEPS = 2
SAMPLED = 128  # tokens of a completion too long to be sampled each time


@dataclass(frozen=True)
class Case:
    """Prompts and their completions, of one length."""

    group: int
    prompt_tokens: int
    completion_tokens: int
    limit_gib: float | None = None
    sampled: int | None = None
    prompts: int = 1


USUAL = {
    "qwen2.5-1.5b/8x1024": Case(8, 256, 768, limit_gib=3),
    "llama-3.1-8b/8x20256": Case(8, 256, 20_000, limit_gib=40, sampled=SAMPLED),
    "qwen2.5-14b/8x2048": Case(8, 512, 1_536, limit_gib=14),
    "llama-3.1-8b/2x33792": Case(2, 512, 33_280, limit_gib=24, sampled=SAMPLED),
    "llama-3.1-8b/2x131072": Case(2, 512, 130_560, limit_gib=80, sampled=SAMPLED),
    "qwen2.5-32b/8x2048": Case(8, 512, 1_536, limit_gib=48, sampled=SAMPLED),
    "qwen2.5-32b/8x8192": Case(8, 512, 7_680, limit_gib=48, sampled=SAMPLED),
    "qwen2.5-32b/2x32768": Case(2, 512, 32_256, limit_gib=48, sampled=SAMPLED),
}
# The usual step (step.py) in so many GiB: does a run stay below, and does it know before how much it will take?
USUAL |= {
    f"{shape}/64x768@{limit}": Case(8, 256, 512, limit_gib=limit, sampled=SAMPLED, prompts=8)
    for shape, limits in (("qwen2.5-1.5b", (24, 80)), ("llama-3.1-8b", (24, 48, 80)), ("qwen2.5-14b", (24, 48, 80)))
    for limit in limits
}
KNOWN = USUAL | {"tiny/2x64": Case(2, 40, 24, limit_gib=4, sampled=8)}


def main() -> None:
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.case:
        cases.answer(work(KNOWN[arguments.case], arguments), lambda: measure(arguments))
    names = cases.chosen(parser, arguments.only, list(USUAL), list(KNOWN))
    if arguments.steps < 1:
        parser.error("--steps must be 1 or more.")
    shown = settings_of(parser, arguments)
    device = cases.device_name(arguments.device)
    about = {"command": "python benchmarks/memory.py", "device": device, "lora_rank": RANK, "base": "nf4"}
    results = cases.Results(cases.results_path(arguments.out, "memory", device), about, judge)
    variant = "".join(f"/{setting}" for setting in arguments.set)
    hidden = ["--steps", str(arguments.steps)]
    sys.exit(cases.Benchmark(arguments, results, needs, in_a_line, shown, hidden, variant).run(names))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_arguments(parser, example="llama-3.1-8b/8x20256")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a case")
    add_settings(parser)
    return parser


def needs(name: str) -> tuple[str, bool]:
    """The checkpoint of a case: in NF4 from the start, for a 32B in bf16 fits on few disks."""
    return name.split("/")[0], True


def work(case: Case, arguments: argparse.Namespace) -> cases.Record:
    """What a case is."""
    sampled = case.sampled or case.completion_tokens
    return dataclasses.asdict(case) | {"sampled": sampled, "steps": arguments.steps}


def measure(arguments: argparse.Namespace) -> cases.Record:
    """One case, in its own process."""
    import our_run

    case = KNOWN[arguments.case]
    usual = {
        "steps": arguments.steps, "prompts_per_step": case.prompts, "group_size": case.group,
        "eval_prompts": case.prompts * case.group,
        "max_completion_tokens": case.completion_tokens, "memory_gib": case.limit_gib or 0.0,
    }  # fmt: skip
    model = model_folder(*needs(arguments.case), arguments.folder)
    config = our_run.our_config(model, "nf4", arguments.device, **(usual | fields_of(arguments.set)))
    return our_run.measure(config, case.prompt_tokens, arguments.started, arguments.until, case.sampled)


def judge(records: dict[str, cases.Record]) -> None:
    """Whether a case stayed within its limit, and how far off the prediction was, as a share of what was measured."""
    for record in records.values():
        peak = record.get("device_peak_gib")
        if peak and record.get("limit_gib"):
            record["within_limit"] = peak <= record["limit_gib"]
        if peak and record.get("predicted_gib"):
            record["predicted_off"] = round(record["predicted_gib"] / peak - 1, 3)


def in_a_line(record: cases.Record) -> str:
    """What was found, for the terminal."""
    peak = record.get("device_peak_gib", record["process_peak_gib"])
    limit = f" of {record['limit_gib']:g} allowed" if record["limit_gib"] else ""
    predicted = f", {record['predicted_gib']:.1f} predicted" if record["predicted_gib"] else ""
    return f"peak {peak:.2f} GiB{limit}{predicted}; update {record['update_s']:.2f} s"


if __name__ == "__main__":
    main()
