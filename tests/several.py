"""Several ranks on this host, each the process of a command: what the tests of ranks share. No test is here.

They are forks of one process that has imported all that a run needs, and find the variables that torchrun sets.
"""

import gc
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["grpo.verbs.train", "grpo.verbs.evaluate", "grpo.ranks"])


def launch(size, folder, argv, **variables):
    """Start the command line in so many processes; what each writes to the terminal is in folder/rank-N.log."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **variables}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "ME": str(rank), **common} for rank in range(size)]
    processes = [CONTEXT.Process(target=_run, args=(str(folder), argv, place)) for place in places]
    for process in processes:
        process.start()
    return processes


def ended(processes, seconds=60):
    """Their exit codes, once all have ended; those that have not are killed and fail the test."""
    for process in processes:
        process.join(seconds)
    late = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for process in processes:
        process.kill()
    assert not late, f"ranks {late} did not end in {seconds} s"
    return [process.exitcode for process in processes]


def run_ranks(size, folder, argv, seconds=60, **variables):
    """The exit codes, and what each rank wrote."""
    codes = ended(launch(size, folder, argv, **variables), seconds)
    return codes, [told(folder, rank) for rank in range(size)]


def told(folder, rank):
    return (Path(folder) / f"rank-{rank}.log").read_text()


def signal_at(moment, number):
    """This process gets a signal, kill -9 or one that stops it, at a moment: "grpo.train.evaluate:call", or ":return";
    ":call:3" is the third."""
    name, event, count = (*moment.split(":"), "1")[:3]
    left = [int(count)]

    def look(frame, happened, _):
        if happened == event and f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}" == name:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)

    sys.setprofile(look)


def _run(folder, argv, variables):
    gc.freeze()  # a collection would look at all that is imported, and copy each page of it that these processes share
    os.chdir(folder)
    log = os.open(f"rank-{variables['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(variables)
    os.environ["OMP_NUM_THREADS"] = "1"
    from grpo.run import main

    for name, number in (("KILL", signal.SIGKILL), ("STOP", signal.SIGSTOP)):
        rank, _, moment = variables.get(name, "").partition(":")
        if rank == variables["RANK"]:
            signal_at(moment, number)
    if "LONG" in variables:  # seconds after which it is said who is waited for
        import grpo.waiting

        grpo.waiting.LONG = float(variables["LONG"])
    if "REHEARSE" in variables:  # as on a GPU
        import grpo.build

        grpo.build.REHEARSED = ("cpu",)
    sys.exit(main(argv))
