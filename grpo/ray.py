"""Ray: `python -m grpo.ray --workers N -m grpo.run TASK.py` starts on a Ray cluster what torchrun starts on hosts.

Knows nothing of runs. Ray Train finds a place for each process and says which one it is; what a worker does there is in
grpo/ray_worker.py.

    python -m grpo.ray --workers 4 --gpu -m grpo.run tasks/gsm8k.py --prompts-per-step 32
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

from grpo import system
from grpo.errors import UserError, in_words
from grpo.ray_worker import Ended, work
from grpo.terminal import plain, say

STOPPED = "Stopped. --resume goes on from the last checkpoint, where there is one.\n"


def main(argv: list[str] | None = None) -> int:
    """Start a command line, by default the process's own, on the cluster and wait for it. Returns its exit code."""
    if argv is None:
        _end_on_signals()
    given = command_line().parse_args(argv)
    try:
        return launch(given)
    except UserError as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        return 2
    except SystemExit as error:  # Ray's own answer to SIGTERM while it starts
        return _end(int(error.code or signal.SIGTERM))


def _end_on_signals() -> None:
    """Ctrl-C, SIGTERM and SIGHUP end this process where it stands, to the very end of it."""
    for each in system.signals("SIGINT", "SIGTERM", "SIGHUP"):
        if each.name != "SIGHUP" or signal.getsignal(each) != signal.SIG_IGN:  # nohup has it ignored, and means it
            signal.signal(each, _end)


def _end(number: int, frame: FrameType | None = None) -> NoReturn:
    """End by this signal. No exception, and nothing of Ray's own end: a thread that waits for Ray while that goes down
    ends the process with exit code 1, or with a trace. Ray misses a driver that is gone, and ends what it has started;
    of a cluster that this process has started some would look for the rest a minute longer.
    """
    with suppress(OSError):  # nobody may be there to read it
        os.write(2, STOPPED.encode())
    with suppress(Exception):  # Ray has psutil loaded where it has started anything; what is left ends by itself
        for each in sys.modules["psutil"].Process().children(recursive=True)[::-1]:
            with suppress(Exception):  # it has just gone
                each.kill()
    os._exit(128 + number)


def command_line() -> argparse.ArgumentParser:
    """Its flags."""
    parser = argparse.ArgumentParser(prog="python -m grpo.ray", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, required=True, help="processes, one a GPU")
    parser.add_argument("--gpu", action="store_true", help="a GPU for each of them; else they compute on CPUs")
    parser.add_argument("--cpus", type=int, default=1, help="that Ray sets aside for each of them")
    parser.add_argument("--max-restarts", type=int, default=0, help="after failures, all of them together")
    parser.add_argument("-m", dest="command", nargs=argparse.REMAINDER, required=True, help="grpo.run and its flags")
    return parser


def launch(given: argparse.Namespace) -> int:
    """The same of flags that were read.

    Raises:
        UserError: Ray is not installed or cannot be reached, or what is asked of it makes no sense.
    """
    if min(given.workers, given.cpus) < 1 or given.max_restarts < 0 or not given.command:
        raise UserError(
            f"--workers is {given.workers}, --cpus {given.cpus}, --max-restarts {given.max_restarts} and -m "
            f"{' '.join(given.command)!r}: give 1 or more, 1 or more, 0 or more, and grpo.run."
        )
    try:
        import ray
        import ray.train.torch
    except ImportError as error:
        raise UserError(f'Ray Train cannot be imported ({error}): pip install "grpo[ray]".') from error
    _join_cluster(ray, given)
    for restarts_left in reversed(range(given.max_restarts + 1)):
        ended = _run_once(ray, given)
        if not any(each.code for each in ended):
            say("All processes have ended well.")
            return 0
        told = what_they_say(ended)
        if restarts_left:
            restart = given.max_restarts - restarts_left + 1
            say(f"note: {told} All processes are started again (restart {restart} of at most {given.max_restarts}).")
    print(f"error: {plain(told)}", file=sys.stderr)
    return next((each.code for each in ended if each.code > 0), 1)


def what_they_say(ended: Sequence[Ended]) -> str:
    """What the first process said that had something to say; else their exit codes."""
    codes = ", ".join(str(each.code) for each in ended)
    return next((each.sentence for each in ended if each.sentence), f"The processes ended with exit codes {codes}.")


def _join_cluster(ray: Any, given: argparse.Namespace) -> None:
    """The cluster that RAY_ADDRESS names or that this host belongs to; else one of this host alone.

    Raises:
        UserError: it does not answer, or did not start.
    """
    try:
        if not ray.is_initialized():
            ours = signal.getsignal(signal.SIGTERM)
            ray.init()
            signal.signal(signal.SIGTERM, ours)  # Ray's would exit with 15 and no word
        has = ray.cluster_resources()
    except Exception as error:
        raise UserError(
            f"Ray's cluster cannot be reached, or did not start on this host: {_first_line(error)} Where there is one, "
            "RAY_ADDRESS names it; `ray status` shows whether it is well."
        ) from error
    wanted = {"CPU": given.workers * given.cpus, "GPU": given.workers * given.gpu}
    short = [f"{has.get(kind, 0):g} {kind}s of {count}" for kind, count in wanted.items() if has.get(kind, 0) < count]
    if short:
        say(f"note: the cluster has {' and '.join(short)} asked for. Ray waits until it has grown; Ctrl-C ends that.")


def _run_once(ray: Any, given: argparse.Namespace) -> list[Ended]:
    """Start all processes and wait for them: how each has ended, or one for all where Ray has lost some."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    each = {"CPU": given.cpus, "GPU": int(given.gpu)}
    trainer = TorchTrainer(
        work,
        train_loop_config={"command": given.command, "folder": os.getcwd()},
        torch_config=TorchConfig(backend="gloo"),  # of the workers, who exchange exit codes and nothing else
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpu, resources_per_worker=each),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=0)),
    )
    ended: list[Ended] = []

    def fit() -> None:
        try:
            ended.extend(Ended(*of_rank) for of_rank in trainer.fit().return_value)
        except Exception as error:  # TrainingFailedError for workers; others where Ray's own processes are gone
            ended.append(lost(error))

    # In the main thread Ray would take Ctrl-C for itself.
    fitting = threading.Thread(target=fit, daemon=True)
    fitting.start()
    fitting.join()
    return ended or [Ended(1, "Ray did not say how the run has ended.")]


def lost(error: Any) -> Ended:
    """What Ray says of workers that it has lost."""
    failures = getattr(error, "worker_failures", {})
    failed = {rank: getattr(failure, "_base_exc", failure) for rank, failure in failures.items()}
    told = "; ".join(f"rank {rank}: {_first_line(failure)}" for rank, failure in failed.items())
    return Ended(1, f"Ray has lost processes of the run, and ended the others. {told or _first_line(error)}")


def _first_line(error: BaseException) -> str:
    first, is_longer, _ = in_words(error).partition("\n")
    return f"{first.rstrip()})." if is_longer else f"{first}."


if __name__ == "__main__":
    sys.exit(main())
