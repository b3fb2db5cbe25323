"""Kill ranks of a run at random moments and start it again, until it is done: nothing may be lost. No test is here.

    python tests/kill_ranks.py --kills 30 --seed 1
    python tests/kill_ranks.py --phases                   one kill of each rank in each phase, from the start to the end

Two ranks on the CPU train the toy task. Again and again one of them, at random, is killed after a random time, while it
starts, samples, computes or saves. Both must have ended within 60 s, and the run must come to the end that it has where
nobody is killed: the same adapter to the bit, the same completions. Prints what was seen as JSON.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from several import ended, launch, run_ranks, told
from test_ranks import adapter, lines, write_task
from toy_task import SMALL

STEPS = 20

PHASES = """
grpo.launcher.launched:call grpo.meeting.meet:call grpo.meeting.connect:return grpo.meeting.Meeting.__init__:return
grpo.meeting.Meeting.agree:return grpo.pulse.Pulse.__init__:call grpo.pulse.Pulse.__init__:return
grpo.ranks.Ranks.__init__:return grpo.resolve.resolve:call grpo.policy.load.load_model:call grpo.build.build_run:return
grpo.train.evaluate:call grpo.train.evaluate:return grpo.checkpoint.save_checkpoint:call
grpo.checkpoint.write_synced:return:3 grpo.checkpoint.save_checkpoint:return grpo.ranks.Ranks.leave:call
grpo.pulse.Pulse.ignore:call grpo.pulse.Pulse.close:call grpo.ranks.Ranks.leave:return
""".split()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600, help="after which no further rank is killed")
    parser.add_argument("--phases", nargs="*", help="moments, as several.signal_at has them; all where none is given")
    arguments = parser.parse_args()
    if arguments.phases is not None:
        for moment in arguments.phases or PHASES:
            for rank in (0, 1):
                kill_in_phase(moment, rank)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(kill(Path(folder), arguments), indent=2))


def kill(folder, arguments):
    draws, stop = random.Random(arguments.seed), time.monotonic() + arguments.seconds
    flags = ["--steps", str(STEPS), "--save-every", "2", "--prompts-per-step", "3", "--eval-every", "5"]
    argv = [write_task(folder), *SMALL, *flags]
    began = time.monotonic()
    codes, logs = run_ranks(2, folder, [*argv, "--run-dir", "whole"], seconds=600)
    assert codes == [0, 0], logs
    span = time.monotonic() - began
    killed, runs, to_end, reached = [0, 0], 0, [], []
    while sum(killed) < arguments.kills and time.monotonic() < stop:
        processes = launch(2, folder, [*argv, "--run-dir", "run", "--resume-or-start"])
        rank = draws.randrange(2)
        processes[1 - rank].join(draws.uniform(0, 0.6 * span))
        if processes[rank].exitcode is None:
            processes[rank].kill()
            killed[rank] += 1
            since = time.monotonic()
            ended(processes)
            to_end.append(round(time.monotonic() - since, 1))
            saved = sorted((folder / "run" / "checkpoints").glob("step-*")) if (folder / "run").exists() else []
            reached.append(int(saved[-1].name[5:]) if saved else 0)
        elif ended(processes) == [0, 0]:
            check_equal(folder)
            runs += 1
            shutil.rmtree(folder / "run")
        print(f"{sum(killed)} killed, at step {reached[-1:]}", file=sys.stderr, flush=True)
    codes, logs = run_ranks(2, folder, [*argv, "--run-dir", "run", "--resume-or-start"], seconds=600)
    assert codes == [0, 0], logs
    check_equal(folder)
    return {
        "killed": {"rank 0": killed[0], "rank 1": killed[1]},
        "runs that came to their end, equal to the bit": runs + 1,
        "seconds until both had ended": {"longest": max(to_end), "median": sorted(to_end)[len(to_end) // 2]},
        "step of the last checkpoint after each": reached,
        "seconds of a run that nobody kills": round(span, 1),
    }


def kill_in_phase(moment, rank):
    """Print how long the other one took to end, and what it said."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        argv = [write_task(folder), *SMALL, "--steps", "3", "--run-dir", "run"]
        processes = launch(2, folder, argv, KILL=f"{rank}:{moment}")
        processes[rank].join(120)
        since = time.monotonic()
        codes = ended(processes)
        said = told(folder, 1 - rank).rpartition("error: ")[2].strip()
        print(f"{moment} on rank {rank}: {codes} after {time.monotonic() - since:.1f} s: {said[:160]}", flush=True)


def check_equal(folder):
    """The run is the one that nobody has killed."""
    expected, found = adapter(folder / "whole", STEPS), adapter(folder / "run", STEPS)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert lines(folder / "whole", "completions.jsonl") == lines(folder / "run", "completions.jsonl")


if __name__ == "__main__":
    main()
