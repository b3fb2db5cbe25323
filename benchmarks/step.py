"""Whole GRPO steps, ours beside TRL and Unsloth: rollout, scoring, update and sync of the same work, one after another.

    python benchmarks/step.py            all cases; writes benchmarks/results/step-<gpu>.json
    python benchmarks/step.py --only llama-3.1-8b/ours-nf4 llama-3.1-8b/trl --deadline 540
    python benchmarks/step.py --only tiny/ours-nf4 --device cpu --tokens 24 --prompt-tokens 48      tries the script

Models have true shapes and random weights, written to --folder once. Each case is a process of its own. 8 prompts of
256 tokens, 8 completions of 512 tokens each that nothing ends early, LoRA r=32 on all linears, random rewards. The
first steps are not timed; figures are medians. Results in the file stay until the same case is measured again.

    ours-nf4, ours-bf16    the product's own loop (our_run.py), at its defaults
    trl                    TRL, bf16, vLLM in its process, without the pass for old log-probabilities: its fastest
    unsloth                Unsloth, 4 bits, its own vLLM engine, at its defaults
    trl-defaults           (when asked for) TRL at its defaults, with that pass
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cases
from our_settings import add_settings, fields_of, settings_of
from shapes import SHAPES, model_folder
from work import COMPLETION_TOKENS, GROUP, PROMPT_TOKENS, PROMPTS, RANK

STEPS = 6
CONTENDERS = ("ours-nf4", "ours-bf16", "trl", "unsloth")
USUAL = [
    f"{shape}/{contender}"
    for shape in ("qwen2.5-1.5b", "qwen3-1.7b", "llama-3.1-8b", "qwen2.5-14b")
    for contender in CONTENDERS
] + [f"{shape}/ours-nf4" for shape in SHAPES if shape.startswith("gemma") or shape.endswith("layers")]
KNOWN = [f"{shape}/{contender}" for shape in SHAPES for contender in (*CONTENDERS, "trl-defaults")]


def main() -> None:
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.case:
        cases.answer(work(arguments), lambda: measure(arguments))
    names = cases.chosen(parser, arguments.only, USUAL, KNOWN)
    shown = changes(parser, arguments)
    if arguments.set and not all("/ours" in name for name in names):
        parser.error("--set is of our Config: name cases of ours with --only.")
    device = cases.device_name(arguments.device)
    about = {
        "command": "python benchmarks/step.py", "device": device, "prompts": PROMPTS, "group_size": GROUP,
        "prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS, "lora_rank": RANK,
    }  # fmt: skip
    results = cases.Results(cases.results_path(arguments.out, "step", device), about, add_ratios)
    variant = "".join(f"/{change}" for change in [*different(arguments), *arguments.set])
    hidden = ["--steps", str(arguments.steps), *(["--profile"] if arguments.profile else [])]
    hidden += ["--unsloth-site", str(arguments.unsloth_site)] if arguments.unsloth_site else []
    sys.exit(cases.Benchmark(arguments, results, needs, in_a_line, shown, hidden, variant).run(names))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases.add_arguments(parser, example="llama-3.1-8b/ours-nf4")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a case; the first two are not timed")
    parser.add_argument("--tokens", type=int, default=COMPLETION_TOKENS, help="of each completion")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS, help="of each prompt")
    add_settings(parser)
    parser.add_argument("--profile", action="store_true", help="of ours, print where the time of two more steps goes")
    parser.add_argument("--unsloth-site", type=Path, help="a folder with Unsloth's packages, for its process alone")
    return parser


def changes(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """The arguments that make the work another one. Ends with a sentence where one makes no sense."""
    if arguments.steps < 1 or arguments.tokens < 1:
        parser.error("--steps and --tokens must be 1 or more.")
    words = [word for change in different(arguments) for word in f"--{change}".split("=")]
    return [*words, *settings_of(parser, arguments)]


def different(arguments: argparse.Namespace) -> list[str]:
    """NAME=VALUE of the lengths that are not the usual ones."""
    lengths = {
        "tokens": (arguments.tokens, COMPLETION_TOKENS),
        "prompt-tokens": (arguments.prompt_tokens, PROMPT_TOKENS),
    }
    return [f"{name}={length}" for name, (length, usual) in lengths.items() if length != usual]


def needs(case: str) -> tuple[str, bool]:
    """The checkpoint of a case: Unsloth reads one in NF4, the others quantise what they load."""
    shape, contender = case.split("/")
    return shape, contender == "unsloth"


def work(arguments: argparse.Namespace) -> cases.Record:
    """What a case is."""
    return {"prompt_tokens": arguments.prompt_tokens, "asked_tokens": arguments.tokens, "steps": arguments.steps}


def measure(arguments: argparse.Namespace) -> cases.Record:
    """One case, in its own process. What it imports is its own too: Unsloth wants to be the first."""
    shape, contender = arguments.case.split("/")
    model = model_folder(*needs(arguments.case), arguments.folder)
    if not contender.startswith("ours"):
        import step_peers

        return step_peers.measure(contender, shape, model, arguments)
    import our_run

    config = our_run.our_config(
        model,
        contender.removeprefix("ours-"),
        arguments.device,
        **{
            "steps": arguments.steps, "prompts_per_step": PROMPTS, "group_size": GROUP,
            "max_completion_tokens": arguments.tokens, **fields_of(arguments.set),
        },
    )  # fmt: skip
    return our_run.measure(
        config, arguments.prompt_tokens, arguments.started, arguments.until, profiled=arguments.profile
    )


def add_ratios(records: dict[str, cases.Record]) -> None:
    """How many of our steps in NF4 a step takes, beside the same shape and work; whether on the same card."""
    for name, record in records.items():
        shape, _, *variant = name.split("/")
        lengths = [part for part in variant if part.partition("=")[0] in ("tokens", "prompt-tokens")]
        ours = records.get("/".join([shape, "ours-nf4", *lengths]), {})
        for follows in ("over_ours", "same_card"):
            record.pop(follows, None)
        if "step_s" in record and "step_s" in ours:
            record["over_ours"] = round(record["step_s"] / ours["step_s"], 3)
            record["same_card"] = record["card"] == ours["card"]


def in_a_line(record: cases.Record) -> str:
    """What was found, for the terminal."""
    names = ("rollout", "update", "sync", "old_logp", "other")
    stages = ", ".join(f"{name} {record[f'{name}_s']:.2f}" for name in names)
    peak = f"; peak {record['device_peak_gib']:.1f} GiB" if "device_peak_gib" in record else ""
    asked, written = record["asked_tokens"], record["completion_tokens"]
    shorter = "" if written == asked else f"; COMPLETIONS OF {written} TOKENS, NOT {asked}"
    return f"step {record['step_s']:.2f} s ({stages}), start {record['start_s']:.0f} s{peak}{shorter}"


if __name__ == "__main__":
    main()
