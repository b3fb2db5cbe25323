"""Whole steps, of SFT and DPO too, and peaks of memory as README and docs/figures.md show them, from results of
benchmarks/step.py, sft.py and memory.py. Knows nothing of how they were made.

`write_readme_table.py` puts it between its markers. A GPU that was not measured has no table.
"""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# In the order in which they are shown; {} is the version that ran.
CONTENDERS = {
    "ours-nf4": ("**ours**, NF4 base", None),
    "ours-bf16": ("**ours**, bf16 base", None),
    "trl": ("TRL {}, bf16, no pass for old log-probabilities", "trl"),
    "trl-defaults": ("TRL {}, bf16, its defaults", "trl"),
    "unsloth": ("Unsloth {}, 4 bits", "unsloth"),
}
STAGES = {
    "rollout": "rollout",
    "update": "update",
    "sync": "sync",
    "old_logp": "old log-probabilities",
    "other": "scoring and the rest",
}
PARTS = "Where the time of these steps goes:"
LONGEST_REASON = 100  # characters of a failure


def whole_steps(results: Path) -> str:
    """Steps of the usual work on shapes that somebody else was measured on too, without their parts."""
    contests = [contest for result in read(results, "step") if (contest := contested(result))["cases"]]
    return "\n\n".join(steps_of(contest, in_short=True).partition(PARTS)[0].rstrip() for contest in contests)


def contested(result: Record) -> Record:
    """The shapes that are not ours alone."""
    shapes = {shape_of(name) for name in result["cases"] if not name.split("/")[1].startswith("ours")}
    return result | {"cases": {name: case for name, case in result["cases"].items() if shape_of(name) in shapes}}


def steps_in_short(results: Path) -> str:
    """Steps of the usual work: the whole, then its parts."""
    return "\n\n".join(steps_of(result, in_short=True) for result in read(results, "step"))


def steps(results: Path) -> str:
    """All steps that were measured, and what ran."""
    return "\n\n".join(steps_of(result, in_short=False) for result in read(results, "step"))


def read(results: Path, benchmark: str) -> list[Record]:
    """What was measured, a GPU each; not what was tried on a CPU."""
    paths = sorted(path for path in results.glob(f"{benchmark}-*.json") if path.stem != f"{benchmark}-cpu")
    return [result for path in paths if (result := json.loads(path.read_text()))["cases"]]


def steps_of(result: Record, in_short: bool) -> str:
    cases = sorted(
        ((name, record) for name, record in result["cases"].items() if not (in_short and name.count("/") > 1)),
        key=lambda case: (case[0].split("/")[0], list(CONTENDERS).index(case[0].split("/")[1]), case[0]),
    )
    whole = (
        "| shape | | step, s | × ours in NF4 | peak, GiB | first step after, s | run |\n"
        "|---|---|---:|---:|---:|---:|---:|"
    )
    header = f"| shape | | {' | '.join(f'{title}, s' for title in STAGES.values())} |\n|---|---|{'---:|' * len(STAGES)}"
    measured = [(name, record) for name, record in cases if "failed" not in record]
    lines = [origin_of_steps(result), "", whole, *(step_line(*case) for case in cases)]
    lines += ["", PARTS, "", header, *(parts_line(*case) for case in measured)]
    if not in_short:
        lines += ["", "What ran:", "", "| shape | | |\n|---|---|---|", *(ran_line(*case) for case in measured)]
    return "\n".join(lines)


def origin_of_steps(result: Record) -> str:
    """The work, the machine and the command."""
    about, records = result["about"], result["cases"].values()
    return (
        f"Whole GRPO steps on one {about['device']}, {dates(records)}{packages(records)}: {about['prompts']} prompts x "
        f"{about['group_size']} completions, {about['prompt_tokens']} + {about['completion_tokens']} tokens, LoRA rank "
        f"{about['lora_rank']}, random weights and rewards, each in a process of its own (`{about['command']}`). "
        "Medians without the first two steps. Peak: of the whole GPU; TRL and Unsloth give vLLM a fixed share of it. "
        "First step: done so long after the process began, with nothing compiled yet where nothing else is said. Cases "
        f"of one run followed each other on one machine.{company(records)}"
    )


def step_line(name: str, record: Record) -> str:
    if "failed" in record:
        return f"| {shape_of(name)} | {contender(name, record)} | {reason(record)} | | | | {record['run']} |"
    ratio = f"{record['over_ours']:.2f}" if "over_ours" in record else ""
    ratio += "" if record.get("same_card", True) else ", another card"
    start = f"{record['start_s']:.0f}" + (", compiled before" if record["compiled_before"] else "")
    numbers = f"{record['step_s']:.2f} | {ratio} | {gib(record.get('device_peak_gib'))} | {start} | {record['run']}"
    return f"| {shape_of(name)} | {contender(name, record)} | {numbers} |"


def parts_line(name: str, record: Record) -> str:
    values = " | ".join(f"{record[f'{stage}_s']:.2f}" for stage in STAGES)
    return f"| {shape_of(name)} | {contender(name, record)} | {values} |"


def ran_line(name: str, record: Record) -> str:
    ran = ", ".join(f"{what} {value}" for what, value in record["ran"].items())
    return f"| {shape_of(name)} | {contender(name, record)} | {ran} |"


def shape_of(name: str) -> str:
    return name.split("/")[0]


def contender(name: str, record: Record) -> str:
    """Who ran, with its version and what was set otherwise."""
    _, kind, *variant = name.split("/")
    title, package = CONTENDERS[kind]
    shown = title.format(record["versions"].get(package, "")) if package and "versions" in record else title.format("")
    return ", ".join([shown.replace(" ,", ","), *variant])


# ---- memory


def memory(results: Path) -> str:
    """Peaks, beside limits and predictions."""
    return "\n\n".join(memory_of(result) for result in read(results, "memory"))


def memory_of(result: Record) -> str:
    about, cases = result["about"], result["cases"]
    header = (
        "| shape | completions x tokens | allowed, GiB | peak, GiB | predicted, GiB | update, s |\n"
        "|---|---|---:|---:|---:|---:|"
    )
    origin = (
        f"Peaks of whole runs of ours on one {about['device']}, {dates(cases.values())}{packages(cases.values())}: NF4 "
        f"base, LoRA rank {about['lora_rank']}, vLLM in the same process; the tokens are prompt and "
        f"completion (`{about['command']}`). Peak: of the whole GPU, as seen from outside.{company(cases.values())}"
    )
    return "\n".join([origin, "", header, *(memory_line(name, record) for name, record in cases.items())])


def memory_line(name: str, record: Record) -> str:
    shape, size, *variant = name.split("/")
    sequences, tokens = size.partition("@")[0].split("x")
    work = ", ".join([f"{sequences} x {int(tokens):,}", *variant])
    allowed = f"{record['limit_gib']:g}" if record.get("limit_gib") else ""
    if "failed" in record:
        return f"| {shape} | {work} | {allowed} | {reason(record)} | | |"
    exceeded = "" if record.get("within_limit", True) else ", more than allowed"
    numbers = f"{gib(record.get('device_peak_gib'))}{exceeded} | {gib(record.get('predicted_gib'))}"
    return f"| {shape} | {work} | {allowed} | {numbers} | {record['update_s']:.2f} |"


# ---- answers and pairs


def lessons(results: Path) -> str:
    """Steps of SFT and DPO."""
    return "\n\n".join(lessons_of(result) for result in read(results, "sft"))


def lessons_of(result: Record) -> str:
    about, cases = result["about"], result["cases"]
    header = (
        "| shape | | | sequences x tokens | step, s | × ours in NF4 | tokens/s | peak, GiB | run |\n"
        "|---|---|---|---|---:|---:|---:|---:|---:|"
    )
    origin = (
        f"Steps of SFT and DPO on one {about['device']}, {dates(cases.values())}{packages(cases.values())}: LoRA rank "
        f"{about['lora_rank']}, random weights, each in a process of its own (`{about['command']}`). Medians without "
        f"the first two steps. Peak: of the whole GPU, the rehearsal before the first step included; without a limit "
        f"the plan of ours takes what memory there is.{company(cases.values())}"
    )
    return "\n".join([origin, "", header, *(lesson_line(*case) for case in cases.items())])


def lesson_line(name: str, record: Record) -> str:
    shape, rest, *variant = name.split("/")
    method, _, who = rest.partition("-")
    title = contender("/".join([shape, who, *variant]), record).replace(", no pass for old log-probabilities", "")
    work = f"{record['sequences']} x {record['sequence_tokens']:,}"
    if "failed" in record:
        return f"| {shape} | {method.upper()} | {title} | {work} | {reason(record)} | | | | {record['run']} |"
    ratio = f"{record['over_ours']:.2f}" if "over_ours" in record else ""
    numbers = f"{record['step_s']:.2f} | {ratio} | {record['tokens_per_second']:,}"
    peak = gib(record.get("device_peak_gib"))
    return f"| {shape} | {method.upper()} | {title} | {work} | {numbers} | {peak} | {record['run']} |"


# ---- words


def gib(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def reason(record: Record) -> str:
    """Why a case has no figures, in a cell."""
    return "failed: " + " ".join(record["failed"].replace("|", "/").split())[:LONGEST_REASON]


def dates(records: Any) -> str:
    """When it was measured: a day, or the first and the last."""
    days = sorted({record["date"] for record in records})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def company(records: Any) -> str:
    """What was busy meanwhile, and beside which runs."""
    runs: dict[str, set[int]] = {}
    for record in records:
        if "beside" in record:
            runs.setdefault(record["beside"], set()).add(record["run"])
    told = (
        f"Beside run{'s' * (len(of) > 1)} {' and '.join(map(str, sorted(of)))}: {what}." for what, of in runs.items()
    )
    return "".join(f" {sentence}" for sentence in told)


def packages(records: Any) -> str:
    """Versions of what all of them share."""
    found = []
    for package, name in (("torch", "torch"), ("vllm", "vLLM"), ("transformers", "transformers")):
        versions = sorted({record["versions"][package] for record in records if package in record.get("versions", {})})
        found += [f"{name} {' and '.join(versions)}"] if versions else []
    return "".join(f", {one}" for one in found)
