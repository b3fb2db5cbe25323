"""vLLM imported as a run would, in a process of its own: it takes seconds, and may end the process that tries it.

Run as a program (`python -m grpo.doctor.trial cuda`) it is that process: its last line is JSON that says what is wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys

from grpo.doctor.findings import Finding, shortened
from grpo.errors import UserError, in_words

SECONDS = 120.0  # a cold disk, and a library of gigabytes
REMEDY = 'Use --engine torch, or install a vLLM that goes with this torch: pip install "grpo[gpu]"'


class Trial:
    """Begins at once, so that other things can be looked at meanwhile."""

    def __init__(self, device: str, seconds: float = SECONDS):
        self.seconds = seconds
        command = [sys.executable, "-m", __name__, device]
        pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.process = subprocess.Popen(command, text=True, errors="replace", **pipes)  # type: ignore

    def finding(self) -> Finding:
        """Waits for the end of it."""
        try:
            out, err = self.process.communicate(timeout=self.seconds)
        except subprocess.TimeoutExpired:
            self.close()
            told = f"vLLM was not imported within {self.seconds:g} s, in a process of its own."
            return Finding("hinders", "vllm", told, "Try again; if it is the same, use --engine torch.")
        lines = out.strip().splitlines()
        try:
            said = json.loads(lines[-1])
        except (IndexError, ValueError):
            last = (err.strip().splitlines() or ["it said nothing"])[-1]
            told = f"Importing vLLM ended the process (exit code {self.process.returncode}): {shortened(last)}"
            return Finding("stops", "vllm", told, REMEDY)
        if said["wrong"]:
            return Finding("stops", "vllm", shortened(said["wrong"]), REMEDY)
        return Finding("fine", "vllm", f"vLLM {said['version']} can be imported beside this torch.")

    def close(self) -> None:
        """End it, if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def main(device: str) -> None:
    """Import, and say how that went."""
    said = {"wrong": "", "version": ""}
    try:
        import torch

        from grpo.rollout.vllm_compat import import_vllm

        said["version"] = str(getattr(import_vllm(torch.device(device)), "__version__", "of unknown version"))
    except UserError as error:
        said["wrong"] = str(error)
    except BaseException as error:  # a library may raise anything, SystemExit too
        said["wrong"] = f"vLLM cannot be imported: {in_words(error)}."
    print()
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1])
