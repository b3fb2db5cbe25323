"""Cases: each is measured in a process of its own, one after another; what came out is kept in a JSON of this GPU.

Knows nothing of what a case measures: a benchmark's own file is started again with --case NAME and prints a line
`RESULT {json}`. While it runs, this process watches how much memory the GPU gives out, and the clock. Imports no
torch: this process must hold no GPU memory itself.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Self

from shapes import is_written, model_folder

RESULT = "RESULT "
GRACE = 30.0  # seconds behind the deadline in which a case may end by itself
SAMPLE_MS = 100  # between two looks at the GPU's memory
PACKAGES = ("torch", "transformers", "vllm", "bitsandbytes", "peft", "trl", "unsloth")

Record = dict[str, Any]


# ---- the command line


def add_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """What every benchmark of cases takes."""
    parser.add_argument(
        "--only", nargs="+", metavar="CASE", help=f"cases, such as {example}; SHAPE alone means all its"
    )
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="from now, after which no step is begun")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-models"), help="where models are written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where results are kept")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--tidy", action="store_true", help="delete a model after its last case: disks are small")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # of the process that measures one
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # time.time() of the deadline
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)


def chosen(parser: argparse.ArgumentParser, only: Sequence[str] | None, usual: Sequence[str], known: Sequence[str]):
    """The cases asked for, in that order; `usual` if none is. Ends with a sentence where one is unknown."""
    names: list[str] = []
    for asked in usual if only is None else only:
        found = [name for name in known if name == asked]
        found = found or [name for name in usual if name.startswith(f"{asked}/")]
        if not found:
            parser.error(f"there is no case {asked}. There are: {', '.join(known)}.")
        names += [name for name in found if name not in names]
    return names


# ---- the process that measures


def answer(work: Record, measure: Callable[[], Record]) -> None:
    """Measure, print what came out, and end at once: the threads of an engine may hang when Python takes leave.

    work: what is to be measured, which is part of the record in any case.
    """
    hide_kernels()
    threading.Thread(target=leave_with_parent, daemon=True).start()
    try:
        record = work | measure()
    except Exception as error:
        import traceback

        traceback.print_exc()
        record = work | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    print(RESULT + json.dumps(record | {"versions": versions()}), flush=True)
    sys.stderr.flush()
    os._exit(0)


def leave_with_parent() -> None:
    """Nobody waits for a result any more when the other end of the standard input is closed."""
    while os.read(0, 1024):  # not sys.stdin: a process forked meanwhile would wait for its lock
        pass
    os._exit(1)


def hide_kernels() -> None:
    """Beside this file lies kernels.py, which is not the package of that name that other packages ask for."""
    here = str(Path(__file__).parent)
    sys.path.remove(here)
    sys.path.append(here)
    found = importlib.util.find_spec("kernels")
    if found and found.origin and Path(found.origin).parent == Path(here):
        sys.modules["kernels"] = None  # type: ignore[assignment]  # as if there were none


def versions() -> dict[str, str]:
    """Of what is installed here."""
    found = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


# ---- the process that waits


def run_case(script: str, name: str, more: Sequence[str], deadline: float | None) -> Record:
    """One case in a process of its own: what it found, and the most memory of the GPU meanwhile.

    deadline: time.time() at which it should be done; it is ended a little later.
    """
    command = [sys.executable, script, *more, "--case", name, "--started", str(time.time())]
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    left = None if deadline is None else max(1.0, deadline + GRACE - time.time())
    lines: list[str] = []
    with GpuMemory() as memory:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="replace", env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            reader = threading.Thread(target=pass_on, args=(process, lines), daemon=True)
            reader.start()
            process.wait(left)
            reader.join(5)
        except subprocess.TimeoutExpired:
            return {"failed": "was not done at the deadline"}
        finally:
            with suppress(ProcessLookupError):  # it, and what it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not lines:
        return {"failed": f"ended with code {process.returncode} and no result"}
    return json.loads(lines[-1]) | memory.record()


def pass_on(process: subprocess.Popen[str], results: list[str]) -> None:
    """What a case prints, as it comes, but for its result."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(RESULT):
            results.append(line.removeprefix(RESULT))
        else:
            print(line, end="", flush=True)


class GpuMemory:
    """Looks, while it is open, at what our GPU has given out to all processes together; nothing without one."""

    def __init__(self) -> None:
        self.before: float | None = None
        self.peak = 0.0
        self.peak_at = self.began = time.time()
        self.watching: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if shutil.which("nvidia-smi"):
            self.before = float(ask_gpu("memory.used"))
            query = [*about_gpu("memory.used"), "-lms", str(SAMPLE_MS)]
            self.watching = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
            self.reader = threading.Thread(target=self._watch, daemon=True)
            self.reader.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.watching:
            self.watching.kill()
            self.watching.wait()
            self.reader.join()
            # What the case before has left may have been on its way out when this one began.
            self.before = min(self.before or 0.0, float(ask_gpu("memory.used")))

    def _watch(self) -> None:
        assert self.watching and self.watching.stdout
        for line in self.watching.stdout:
            with suppress(ValueError):
                if float(line) > self.peak:
                    self.peak, self.peak_at = float(line), time.time()

    def record(self) -> Record:
        """The peak, less what was taken before, in GiB, and when it was first seen, in seconds since the beginning."""
        if self.before is None:
            return {}
        peak = round((self.peak - self.before) / 1024, 2)
        return {"device_peak_gib": peak, "device_peak_at_s": round(self.peak_at - self.began, 1)}


def ask_gpu(what: str) -> str:
    """A property of our GPU, as nvidia-smi calls it."""
    return subprocess.run(about_gpu(what), check=True, capture_output=True, text=True).stdout.strip()


def about_gpu(what: str) -> list[str]:
    """The command that prints it, of the first GPU that CUDA shows to processes here: nvidia-smi knows all of them."""
    ours = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    return ["nvidia-smi", "-i", ours, f"--query-gpu={what}", "--format=csv,noheader,nounits"]


def device_name(device: str) -> str:
    """What results are named after."""
    return ask_gpu("name") if device != "cpu" and shutil.which("nvidia-smi") else "cpu"


def card() -> str:
    """Which card of its kind: figures of one can be compared."""
    return ask_gpu("uuid")[-8:] if shutil.which("nvidia-smi") else "cpu"


# ---- what is kept


class Results:
    """The JSON of a benchmark on a GPU: {"about": ..., "cases": {name: record}}."""

    def __init__(self, path: Path, about: Record, finish: Callable[[dict[str, Record]], None] = lambda cases: None):
        """about: of all cases. finish: adds to the records what follows from several of them."""
        self.path, self.about, self.finish = path, about, finish
        self.number = 1 + max((record["run"] for record in self.cases().values()), default=0)

    def cases(self) -> dict[str, Record]:
        """What is kept so far."""
        return json.loads(self.path.read_text())["cases"] if self.path.exists() else {}

    def keep(self, name: str, record: Record, command: str) -> None:
        """Add a record; the one before it goes. A failure takes no measurement's place."""
        cases = self.cases()
        if "failed" in record and "failed" not in cases.get(name, {"failed": ""}):
            print(f"{name} failed; what was measured of it before is kept", flush=True)
            return
        told = {"run": self.number, "date": date.today().isoformat(), "card": card(), "command": command}
        cases[name] = record | told
        self.finish(cases)
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps({"about": self.about, "cases": cases}, indent=1) + "\n")
        beside.replace(self.path)


def results_path(out: Path, benchmark: str, device: str) -> Path:
    """Of a benchmark on this kind of GPU."""
    return out / f"{benchmark}-{device.lower().replace(' ', '-')}.json"


@dataclass
class Benchmark:
    """Cases of one script, as its command line asks for them."""

    arguments: argparse.Namespace
    results: Results
    needs: Callable[[str], tuple[str, bool]]  # case -> (shape, whether its checkpoint is one in NF4)
    say: Callable[[Record], str]  # a record in a line
    # Words that cases are started with beside the common ones, as part of the command that is kept, or not.
    shown: Sequence[str] = ()
    hidden: Sequence[str] = ()
    variant: str = ""  # behind the name that a record is kept under, where the work is not the usual one

    def run(self, names: Sequence[str]) -> int:
        """Every case in turn, kept as soon as it is there; the exit code: 1 if one failed or was not begun in time."""
        self.results.path.parent.mkdir(parents=True, exist_ok=True)
        failures = 0
        for index, name in enumerate(names):
            if self.deadline is not None and time.time() > self.deadline:
                print(f"past the deadline: not begun: {', '.join(names[index:])}", flush=True)
                return 1
            record = self.measure(name)
            failures += "failed" in record
            command = ["python", f"benchmarks/{Path(sys.argv[0]).name}", "--only", name, *self.shown]
            self.results.keep(name + self.variant, record, " ".join(command))
            print(f"{name + self.variant}: {record.get('failed') or self.say(record)}", flush=True)
            later = [self.needs(other) for other in names[index + 1 :]]
            if self.arguments.tidy and self.needs(name) not in later:
                shutil.rmtree(self.model(name), ignore_errors=True)
        return min(failures, 1)

    @property
    def deadline(self) -> float | None:
        """As time.time() has it."""
        return None if self.arguments.deadline is None else self.arguments.started + self.arguments.deadline

    def model(self, name: str) -> Path:
        """The checkpoint of a case."""
        shape, quantized = self.needs(name)
        return model_folder(shape, quantized, self.arguments.folder)

    def measure(self, name: str) -> Record:
        """One case, its model written if it is not there."""
        folder = self.arguments.folder
        if not is_written(*self.needs(name), folder):
            print(f"{name}: writing its model", flush=True)
            try:
                self.write(name)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                return {"failed": f"its model could not be written: {error}"}
        own = ["--folder", str(folder), "--device", self.arguments.device]
        own += [] if self.deadline is None else ["--until", str(self.deadline)]
        begun = folder / "begun" / re.sub(r"[^\w.=-]", "_", name + self.variant)
        record = {"compiled_before": begun.exists()}
        begun.parent.mkdir(exist_ok=True)
        begun.touch()
        return record | run_case(sys.argv[0], name, [*own, *self.shown, *self.hidden], self.deadline)

    def write(self, name: str) -> None:
        """The model of a case, by a process that gives back the GPU's memory when it ends."""
        shape, quantized = self.needs(name)
        words = [shape, str(self.arguments.folder), "nf4" if quantized else "bf16"]
        left = None if self.deadline is None else max(1.0, self.deadline - time.time())
        script = Path(__file__).with_name("random_models.py")
        subprocess.run([sys.executable, str(script), *words], check=True, timeout=left)
