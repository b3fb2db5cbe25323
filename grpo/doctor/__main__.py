"""The command: `python -m grpo.doctor [TASK] [flags of grpo.run] [--json]`. Trains nothing, loads no weights.

    python -m grpo.doctor                             this machine: versions, GPU, disk, hub
    python -m grpo.doctor gsm8k                       and the engine, kernels, layers, memory and data of a task's run
    python -m grpo.doctor gsm8k --model Qwen/Qwen3-8B --base nf4 --json

Exit codes: 0 a run would start, 1 it would not, 2 bad input.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grpo.command import Options, parse
from grpo.config import Config
from grpo.doctor.findings import Finding, found, ordered, would_start
from grpo.doctor.machine import OFFLINE, Hub, cards, look_at_compiler, look_at_disk, look_at_gpu
from grpo.doctor.trial import Trial
from grpo.doctor.versions import TESTED, import_needed, look_at_versions, versions
from grpo.errors import UserError
from grpo.resolve import Resolved, resolve
from grpo.sources import local_path
from grpo.system import lacking
from grpo.task import load_task, task_file
from grpo.terminal import console, leave_a_broken_pipe, plain, plain_logs, say

TITLES = {"stops": "STOPS", "hinders": "hinders", "note": "note", "fine": "fine"}
JSON = "--json"


@dataclass
class Examined:
    """All that was found out."""

    findings: list[Finding] = field(default_factory=list)
    chosen: dict[str, str] = field(default_factory=dict)  # of the task's run: model, base, device, engine, data

    def as_json(self) -> str:
        said = {
            "would_start": would_start(self.findings),
            "findings": [asdict(finding) for finding in ordered(self.findings)],
            "chosen": self.chosen,
            "versions": versions(),
            "tested": TESTED,
        }
        return json.dumps(said, indent=2)


def main(argv: list[str] | None = None) -> int:
    """Run a command line, by default the process's own. Returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(words):
        say((__doc__ or "").strip())
        return 0
    try:
        options = _options([word for word in words if word != JSON])
        if argv is None:
            plain_logs()
        examined = examine(options, [word for word in words if word != JSON])
        _show(examined, as_json=JSON in words)
    except UserError as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        leave_a_broken_pipe()
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if would_start(examined.findings) else 1


def _options(words: list[str]) -> Options:
    """What the command line says, which `resolve` reads too.

    Raises:
        UserError: it is not one, or names a task file that is not there.
    """
    options, _ = parse(words)
    verbs = [f"--{name}" for name in ("check", "eval", "resume") if getattr(options, name)]
    if verbs or options.resume_or_start:
        raise UserError(f"{(verbs or ['--resume-or-start'])[0]} is of grpo.run. Here a task and its flags are given.")
    if not options.task and words:
        raise UserError(f"{words[0]} says how a task is run: give the task too, as in `python -m grpo.doctor gsm8k`.")
    if options.task and ("\0" in options.task or not Path(task_file(options.task)).is_file()):
        load_task(options.task)  # which says that it is not there, and what is
    return options


def examine(options: Options, words: list[str]) -> Examined:
    """Look at everything. words: the command line's, without --json."""
    examined, hub = Examined(), Hub()
    findings = examined.findings
    findings += look_at_versions()
    broken = import_needed()
    findings += broken
    if not broken:
        import torch  # now it is known that it can be

        findings += look_at_gpu(torch, cards())
        if torch.cuda.is_available():
            findings += look_at_compiler()
    findings += [Finding("note", "system", f"{told[:1].upper()}{told[1:]}.") for told in lacking()]
    findings.append(hub.finding())
    if not hub.answers():
        os.environ.setdefault(OFFLINE[0], "1")  # of this process alone: nothing waits for it again
    if not options.task:
        findings += look_at_disk(Path.cwd() / "runs")
    elif broken:
        with found(findings, "task"):
            load_task(options.task)
    else:
        _of_task(examined, words)
    return examined


def _of_task(examined: Examined, words: list[str]) -> None:
    """What a task's run would be."""
    findings = examined.findings
    with found(findings, "task", "Mend the task file."):
        _, resolved = resolve(words)
        findings.append(Finding("fine", "task", f"{resolved.task.name} ({resolved.task_path}) can be loaded."))
        findings += _instead(resolved)
        findings += _data(resolved)
        _of_config(examined, resolved)


def _instead(resolved: Resolved) -> list[Finding]:
    """The embedded default, where a run takes that in place of what the task means."""
    if not resolved.missing:
        return []
    told = (
        f"Missing is {'; '.join(resolved.missing)}: instead of {resolved.task.config.model} a run trains the tiny "
        "model that ships with the package."
    )
    return [Finding("hinders", "task", told, "Run it on a machine that has these, or give --model and --data.")]


def _data(resolved: Resolved) -> list[Finding]:
    """Whether the data are here. Their rows are tried by --check."""
    data, task = resolved.config.data or resolved.task.data, resolved.task
    check = f"`python -m grpo.run {resolved.task_path} --check` tries its rows."
    if task.made_up or data == "embedded":
        return [Finding("fine", "data", f"Made by the task ({data}). {check}")]
    findings: list[Finding] = []
    with found(findings, "data"):
        if path := local_path(data):
            return [Finding("fine", "data", f"{path[0]} is here. {check}")]
        return [Finding("fine", "data", f"{data} is a data set of the hub. {check}")]
    return findings


def _of_config(examined: Examined, resolved: Resolved) -> None:
    """What its configuration comes to on this machine."""
    from grpo.doctor import choice  # with transformers, which can be imported by now
    from grpo.policy.optimizer import check_optimizer
    from grpo.record.trackers import check_installed
    from grpo.rollout.server import check_reachable
    from grpo.start import find_adapter

    findings, config = examined.findings, resolved.config
    device = choice.device_of(config, findings)
    if device is None:
        return
    engine, told = choice.engine_of(config, device)
    trial = _trial(device, findings) if engine == "vllm" else None
    try:
        findings += [told, choice.look_at_kernels(config, device)]
        of_model, sizes = choice.look_at_model(config, device)
        findings += of_model
        with found(findings, "log"):
            check_installed(config.log)
        with found(findings, "optimizer", "pip install bitsandbytes, or use --optimizer adamw"):
            check_optimizer(config, device)
        with found(findings, "servers"):
            if engine == "server":
                check_reachable(config, config.model)
        with found(findings, "adapter"):
            if config.adapter:
                find_adapter(config.adapter)
        needed = choice.bytes_of_run(config, sizes) if sizes else 0
        findings += look_at_disk(resolved.here / (config.run_dir or "runs"), needed)
        findings += [trial.finding()] if trial else []
    finally:
        if trial:
            trial.close()
    examined.chosen |= _chosen(config, resolved, engine, str(device))


def _trial(device: Any, findings: list[Finding]) -> Trial | None:
    """vLLM tried in a process of its own; where it is not installed there is nothing to try."""
    from grpo.rollout.vllm_compat import import_vllm, is_installed

    if is_installed():
        return Trial(device.type)
    with found(findings, "vllm"):
        import_vllm(device)  # which says what to install
    return None


def _chosen(config: Config, resolved: Resolved, engine: str, device: str) -> dict[str, str]:
    data = config.data or resolved.task.data
    return {"model": config.model, "base": config.base, "device": device, "engine": engine, "data": data}


# ---- showing


def _show(examined: Examined, as_json: bool) -> None:
    if as_json:
        console.file.write(examined.as_json() + "\n")
        console.file.flush()
        return
    for line in lines_of(examined.findings):
        say(line)


def lines_of(findings: list[Finding]) -> list[str]:
    """The verdict, and each finding with its remedy below it, the heaviest first."""
    stops, hinders = (sum(each.weight == weight for each in findings) for weight in ("stops", "hinders"))
    verdict = "A run would not start" if stops else "A run would start"
    counts = [f"{stops} to mend"] * bool(stops) + [f"hindered by {hinders}"] * bool(hinders)
    width = max(len(each.subject) for each in findings)
    lines = [f"{verdict}{': ' if counts else ''}{', '.join(counts)}."]
    for each in ordered(findings):
        lines.append(f"{TITLES[each.weight]:7}  {each.subject:{width}}  {each.told}")
        lines += [f"{'':7}  {'':{width}}  -> {each.remedy}"] if each.remedy else []
    return lines


if __name__ == "__main__":
    sys.exit(main())
