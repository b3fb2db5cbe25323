"""Ray: `python -m grpo.ray --workers N -m grpo.run TASK.py` starts on a Ray cluster what torchrun starts on hosts.

Knows nothing of runs. Ray Train finds a place for each process and says which one it is; each worker then starts the
command as torchrun would, in a process of its own, and waits for it:

    python -m grpo.ray --workers 4 --gpu -m grpo.run tasks/gsm8k.py --prompts-per-step 32

The processes meet at the store that Ray's first worker keeps, which outlives them, as torchrun's agent's does. A worker
reports a failure only when all processes have ended: Ray ends the others at the first report, and rank 0 may be saving.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

from grpo.errors import UserError
from grpo.terminal import plain, say


class Failed(Exception):
    """The processes have ended, and not all of them well.

    codes       exit code of each rank
    sentence    what this worker's process has told the user; empty where that was another's to tell
    """

    def __init__(self, codes: list[int], sentence: str):
        super().__init__(codes, sentence)
        self.codes, self.sentence = codes, sentence

    def __str__(self) -> str:
        return self.sentence or f"The processes ended with exit codes {', '.join(map(str, self.codes))}."


def work(given: dict[str, Any]) -> None:
    """What a worker of Ray does, whose environment has the variables that torchrun sets too.

    Raises:
        Failed: a process did not end well.
    """
    import torch.distributed

    kept_by_ray = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    code, sentence = _run([sys.executable, "-m", *given["command"]], given["folder"], os.environ | kept_by_ray)
    codes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(codes, code)
    if any(codes):
        raise Failed(codes, sentence)


def _run(command: list[str], folder: str, environment: dict[str, str]) -> tuple[int, str]:
    """The exit code of a command, and the sentence that it ended with. What it prints goes where Ray shows it."""
    told = ""
    with subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            told = line if line.startswith("error: ") else told and told + line
    return process.returncode, told.removeprefix("error: ").strip()


def main(argv: list[str] | None = None) -> int:
    """Start the command on the cluster and wait for it. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m grpo.ray", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, required=True, help="processes, one a GPU")
    parser.add_argument("--gpu", action="store_true", help="a GPU for each of them; else they compute on CPUs")
    parser.add_argument("--cpus", type=int, default=1, help="that Ray sets aside for each of them")
    parser.add_argument("--max-restarts", type=int, default=0, help="after failures, all of them together")
    parser.add_argument("-m", dest="command", nargs=argparse.REMAINDER, required=True, help="grpo.run and its flags")
    try:
        return launch(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        return 2


def launch(given: argparse.Namespace) -> int:
    """The same of flags that were read.

    Raises:
        UserError: Ray is not installed, or what is asked of it makes no sense.
    """
    if given.workers < 1 or not given.command:
        raise UserError(
            f"--workers is {given.workers} and -m {' '.join(given.command)!r}: give 1 or more, and grpo.run."
        )
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise UserError(f'Ray Train cannot be imported ({error}): pip install "grpo[ray]".') from error
    each = {"CPU": given.cpus, "GPU": int(given.gpu)}
    trainer = TorchTrainer(
        work,
        train_loop_config={"command": given.command, "folder": os.getcwd()},
        torch_config=TorchConfig(backend="gloo"),  # of the workers, who exchange exit codes and nothing else
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpu, resources_per_worker=each),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=given.max_restarts)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        return _tell(error)
    say("All processes have ended well.")
    return 0


def _tell(error: Any) -> int:
    """What the first process said that had something to say, and its exit code; else what Ray says."""
    failures = getattr(error, "worker_failures", {})
    failed = [getattr(failure, "_base_exc", failure) for failure in failures.values()]
    ours = [failure for failure in failed if isinstance(failure, Failed)]
    sentences = [failure.sentence for failure in ours if failure.sentence]
    print(f"error: {plain(sentences[0] if sentences else str(ours[0] if ours else error))}", file=sys.stderr)
    return next((code for failure in ours for code in failure.codes if code > 0), 1)


if __name__ == "__main__":
    # What is sent to workers is found by its name there, and `__main__` is another program in each.
    from grpo.ray import main as started

    sys.exit(started())
