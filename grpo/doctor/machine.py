"""Machine: GPU and driver, a compiler for kernels, the disk that runs are written to, the hub.
Knows nothing of tasks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from grpo.doctor.findings import Finding, looked

GIB = 2**30
QUERY = ("name", "compute_cap", "memory.total", "memory.free", "driver_version")
SMI_SECONDS = 20.0  # a driver that hangs
HUB, HUB_SECONDS = "https://huggingface.co", 3.0
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
SPARE_GIB = 1.0  # of a disk: what a run of a small model writes in a night
IN_USE = 0.1  # of a GPU's memory: what its desktop takes


@dataclass(frozen=True)
class Gpu:
    """A card as nvidia-smi tells it."""

    name: str
    capability: str
    total: float  # GiB
    free: float
    driver: str


def cards() -> list[Gpu]:
    """What nvidia-smi tells; none where there is none of them or no driver answers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    done = looked(_output, command)
    rows = [[cell.strip() for cell in line.split(",")] for line in (done or "").splitlines()]
    return [gpu for row in rows if len(row) == len(QUERY) and (gpu := looked(_gpu, row))]


def _output(command: list[str]) -> str:
    made = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=SMI_SECONDS, stdin=subprocess.DEVNULL
    )
    return made.stdout if made.returncode == 0 else ""


def _gpu(row: list[str]) -> Gpu:
    name, capability, total, free, driver = row
    return Gpu(name, capability, float(total) / 1024, float(free) / 1024, driver)


def look_at_gpu(torch: Any, there: list[Gpu]) -> list[Finding]:
    """Whether torch sees a GPU, and if it does not although there is one, why. there: what nvidia-smi tells."""
    if torch.cuda.is_available():
        return [*_of_memory(there), _seen(torch, there)]
    if not there:
        told = "There is no NVIDIA GPU here: a run is on the CPU, which is for the embedded model and small trials."
        return [Finding("hinders", "gpu", told, "Run it on a machine with a CUDA GPU.")]
    card = f"There is an {there[0].name} (driver {there[0].driver}), but"
    if torch.version.cuda is None:
        told = f"{card} this torch, {torch.__version__}, is built without CUDA."
        index = "https://pytorch.org/get-started/locally"
        return [Finding("hinders", "gpu", told, f"Install a torch with CUDA for that driver: {index}")]
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        told = f"{card} CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides it."
        return [Finding("hinders", "gpu", told, "unset CUDA_VISIBLE_DEVICES")]
    told = f"{card} torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it: {_refusal(torch)}"
    return [Finding("hinders", "gpu", told, "Update the driver, or install a torch built for an older CUDA.")]


def _refusal(torch: Any) -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return " ".join(str(error).split())
    return "it does not say why."


def _seen(torch: Any, there: list[Gpu]) -> Finding:
    properties = torch.cuda.get_device_properties(0)
    driver = f", driver {there[0].driver}" if there else ""
    told = (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / GIB:.1f} GiB{driver}, CUDA {torch.version.cuda}."
    )
    others = torch.cuda.device_count() - 1
    return Finding("fine", "gpu", told + (f" A run uses one GPU; {others} more are here." if others else ""))


def _of_memory(there: list[Gpu]) -> list[Finding]:
    used = there[0].total - there[0].free if there else 0.0
    if not there or used < IN_USE * there[0].total:
        return []
    told = f"{used:.1f} of the GPU's {there[0].total:.1f} GiB are in use by others."
    return [Finding("hinders", "gpu", told, "End what uses it (nvidia-smi says what), or give --memory-gib.")]


def look_at_compiler() -> list[Finding]:
    """Triton compiles a few lines of C for every kernel that it launches."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), "")
    if not compiler:
        told = "There is no C compiler, which Triton needs to launch a kernel."
        return [Finding("stops", "kernels", told, "apt install gcc (or set CC)")]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        told = "Python's headers (Python.h) are not here, which Triton may need to launch a kernel."
        return [Finding("hinders", "kernels", told, "apt install python3-dev")]
    return []


def look_at_disk(folder: Path, needed: int = 0) -> list[Finding]:
    """Whether runs can be written to a folder, which need not be there yet. needed: bytes, as far as they are known."""
    there = next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        told = f"{there}, where the run would be written, is no folder that you may write to."
        return [Finding("stops", "disk", told, "Go to a folder of yours, or give --run-dir.")]
    usage = looked(shutil.disk_usage, there)
    if usage is None:
        return []
    free, want = usage.free / GIB, max(SPARE_GIB, needed / GIB)
    told = f"{free:,.1f} GiB are free where runs are written ({folder})"
    if free < want:
        told += f", and about {want:,.1f} GiB are needed"
        return [Finding("hinders", "disk", f"{told}.", "Free some, or give --run-dir.")]
    return [Finding("fine", "disk", f"{told}.")]


class Hub:
    """Asks the hub whether it answers, from the start on and while other things are looked at. The time limit is of
    everything: a name server that does not answer is not waited for."""

    def __init__(self, seconds: float = HUB_SECONDS):
        self.address = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
        self.is_off = any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE)
        self.seconds, self.wrong = seconds, f"no answer within {seconds:g} s"
        self.thread = Thread(target=self._ask, daemon=True)
        if not self.is_off:
            self.thread.start()

    def _ask(self) -> None:
        try:
            request = urllib.request.Request(self.address, method="HEAD")
            with urllib.request.urlopen(request, timeout=self.seconds):
                self.wrong = ""
        except urllib.error.HTTPError as error:  # it answers, if not to this
            self.wrong = "" if error.code < 500 else f"HTTP {error.code}"
        except Exception as error:  # of sockets, of TLS, of a proxy, of an address that is none
            self.wrong = str(getattr(error, "reason", None) or error) or type(error).__name__

    def answers(self) -> bool:
        """Waits no longer than the limit."""
        if self.is_off:
            return False
        self.thread.join(self.seconds)
        return not self.wrong

    def finding(self) -> Finding:
        """Being offline is no fault: what is missing then is told where it is missed."""
        if self.is_off:
            name = next(name for name in OFFLINE if os.environ.get(name))
            return Finding("note", "hub", f"{name} is set: models and data come from here and from the local cache.")
        if self.answers():
            return Finding("fine", "hub", f"{self.address} answers.")
        told = f"{self.address} cannot be reached ({self.wrong}): models and data come from here and the local cache."
        return Finding("note", "hub", told, "Behind a proxy, set HTTPS_PROXY; a mirror is named by HF_ENDPOINT.")
