"""A rank that hangs (SIGSTOP, as a machine or a network that is gone) ends all within a minute, wherever it hangs: in a
pass over a base in parts, in an update, while it saves, in the rehearsal, in the held-out score."""

import time

import pytest
from several import ended, launch, told
from test_ranks import write_task
from test_ranks_end import saved
from test_ranks_sharded import SFT
from toy_task import SMALL

pytestmark = pytest.mark.slow

IN_PARTS = [*SFT, "--shard-base", "--save-every", "1"]
GRPO = [*SMALL, "--steps", "4", "--save-every", "1", "--eval-every", "2"]

# who is stopped when, in which run, and what is saved by then
MOMENTS = {
    "a forward pass over parts": ("1:grpo.policy.shards.Shards._gather:call:70", IN_PARTS, 0),
    "a backward pass over parts": ("0:grpo.policy.shards.Shards._come_back:return:9", IN_PARTS, 0),
    "an update": ("1:grpo.ranks.Ranks.sum_gradients:call:3", GRPO, 2),
    "saving": ("0:grpo.checkpoint._signed:call:2", GRPO, 1),
    "the rehearsal": ("1:grpo.policy.policy.Policy.rehearse:call", GRPO, 0),
    "the held-out score": ("1:grpo.train.evaluate:call:2", GRPO, 2),
}


def is_stopped(process):
    with open(f"/proc/{process.pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] == b"T"


def test_a_rank_that_hangs_ends_all_wherever_that_is(tmp_path):
    """All of these runs at the same time: each waits 20 seconds for a word of the rank, and 25 for its end."""
    runs, since = {}, {}
    for name, (moment, argv, _) in MOMENTS.items():
        (tmp_path / name).mkdir()
        command = [write_task(tmp_path / name), *argv, "--run-dir", "run"]
        runs[name] = launch(2, tmp_path / name, command, STOP=moment, REHEARSE="")
    while len(since) < len(runs):
        for name, processes in runs.items():
            stops = processes[int(MOMENTS[name][0][0])]
            assert stops.exitcode is None or name in since, (name, told(tmp_path / name, 0), told(tmp_path / name, 1))
            if name not in since and is_stopped(stops):
                since[name] = time.monotonic()
        time.sleep(0.05)
    for name, processes in runs.items():
        moment, _, steps = MOMENTS[name]
        codes = ended(processes, max(0.0, since[name] + 60 - time.monotonic()))
        rank = int(moment[0])
        said = told(tmp_path / name, 0) + told(tmp_path / name, 1)
        assert codes[1 - rank] == 2 and codes[rank] == -9, (name, codes, said)
        # Here rank 0 holds the store that ranks meet at, which hangs with it; torchrun holds it itself.
        silent = f"Rank {rank} (" in said and "Nothing was heard of it for 20 s" in said
        assert silent or (rank == 0 and "the store that all ranks meet at does not answer" in said), (name, said)
        assert not steps or len(saved(tmp_path / name / "run")) >= steps, name
