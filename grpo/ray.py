"""Ray: `python -m grpo.ray --workers N -m grpo.run TASK.py` starts on a Ray cluster what torchrun starts on hosts.

Knows nothing of runs. Ray Train finds a place for each process and says which one it is; what a worker does there is in
grpo/ray_worker.py.

    python -m grpo.ray --workers 4 --gpu -m grpo.run tasks/gsm8k.py --prompts-per-step 32
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from grpo.errors import UserError
from grpo.ray_worker import Failed, work
from grpo.terminal import plain, say


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
    sys.exit(main())
