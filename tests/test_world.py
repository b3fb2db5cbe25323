"""How work is dealt out, and what a process finds of its launcher. What several processes do is in test_ranks.py."""

import os
import random
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from grpo.build import rounded_otherwise
from grpo.config import Config
from grpo.errors import Stopped, ToldElsewhere, UserError
from grpo.exchange import Share, means, sums
from grpo.launcher import launched, launcher_told, leave_variables, take_own_gpu
from grpo.packing import build_packer, share_of
from grpo.pulse import RankLost
from grpo.ranks import Left, Ranks, as_told
from grpo.terminal import plain
from grpo.types import Completion, Group, Prompt
from grpo.verbs.together import same_command, same_questions
from grpo.world import ALONE, World, deal


class Rank(World):
    """One of several, that nobody else is there for."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def test_the_largest_share_is_near_the_best_that_there_is():
    draws = random.Random(3)
    for count in (2, 3):
        for _ in range(40):
            costs = [draws.choice([1, 2, 7, 30]) * draws.random() for _ in range(draws.randint(1, 7))]
            shares = deal(costs, count)
            assert sorted(index for share in shares for index in share) == list(range(len(costs)))
            assert shares == [sorted(share) for share in shares]
            spent = [sum(costs[index] for index in share) for share in shares]
            owners = product(range(count), repeat=len(costs))
            best = min(
                max(sum(c for c, o in zip(costs, of, strict=True) if o == k) for k in range(count)) for of in owners
            )
            assert max(spent) <= best * (4 / 3 - 1 / (3 * count)) + 1e-9  # Graham 1969


def test_equal_costs_are_dealt_out_evenly():
    assert sorted(map(len, deal([5.0] * 8, 3))) == [2, 3, 3]
    assert deal([1, 2, 3], 1) == [[0, 1, 2]]


def groups_of(lengths):
    return [
        Group(
            Prompt(row, "", [1] * prompt, {}),
            [Completion([2] * n, [0.0] * n, "", "stop", 0) for n in completions],
            advantages=torch.arange(len(completions)).float() - 1.5,
        )
        for row, (prompt, completions) in enumerate(lengths)
    ]


LENGTHS = [(4, [3, 9, 1]), (11, [2]), (1, [30, 5, 6, 7]), (2, [8, 8])]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 20])
def test_parts_of_a_step_are_all_of_it_once_and_of_equal_size(size):
    pieces = [(group, list(range(len(group.completions)))) for group in groups_of(LENGTHS)]
    parts = [share_of(pieces, rank, size) for rank in range(size)]
    got = [(id(group), member) for part in parts for group, members in part for member in members]
    assert got == [(id(group), member) for group, members in pieces for member in members]  # in order, once
    longest = max(prompt + max(completions) for prompt, completions in LENGTHS)
    total = sum(prompt + sum(completions) for prompt, completions in LENGTHS)
    for part in parts:
        tokens = sum(len(group.completions[member].tokens) for group, members in part for member in members)
        assert tokens <= total / size + longest


def test_the_weights_of_all_ranks_are_those_of_one_process():
    """One denominator, whoever computes what; also with a rank that has nothing to compute."""
    groups = groups_of(LENGTHS)
    groups[1].advantages = torch.zeros(1)  # without a gradient
    config, cpu = Config(tokens_per_batch=25, normalization="grpo"), torch.device("cpu")

    def weights(world):
        [batches] = build_packer(config, cpu, world=world)(groups)
        return [weight for batch in batches for weight in batch.weights[batch.mask].tolist()]

    assert sorted(weights(ALONE)) == sorted(w for rank in range(12) for w in weights(Rank(rank, 12)))
    assert not all(weights(Rank(rank, 12)) for rank in range(12))


def test_groups_come_back_in_their_order():
    prompts = [Prompt(row, "", [1] * length, {}) for row, length in enumerate([3, 50, 7, 20, 1])]
    shares = [Share(Rank(rank, 2), prompts, 10) for rank in range(2)]
    assert sorted(shares[0].rows + shares[1].rows) == [0, 1, 2, 3, 4]
    made = [(list(share.rows), [Group(prompt, []) for prompt in share.prompts]) for share in shares]

    class Both(Rank):
        def gather(self, value):
            rows, groups = made[1]
            return [value, (list(zip(rows, groups, strict=True)), "b")]

    share = Share(Both(0, 2), prompts, 10)
    groups, told = share.exchange(made[0][1], "a")
    assert [group.prompt for group in groups] == prompts
    assert told == ["a", "b"]


def test_means_count_what_they_are_of():
    assert means([(2, {"x": 1.0}), (6, {"x": 3.0, "y": 5.0})]) == {"x": 2.5, "y": 5.0}
    assert sums([{"x": 1.0}, {}, {"x": 3.0, "y": 5.0}]) == {"x": 4.0, "y": 5.0}


PLACE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    def build(**variables):
        monkeypatch.setattr(os, "environ", dict(variables))
        return os.environ

    return build


def test_a_process_by_itself_has_no_place(environment):
    environment(RANK="0")  # of something else
    assert launched() is None


def test_what_the_launcher_says_is_read_and_taken_away(environment):
    variables = environment(**PLACE, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="x", HOME="/h")
    place = launched()
    assert (place.rank, place.size, place.local_rank, place.host, place.port) == (3, 4, 1, "a", 29500)
    assert place.by_agent
    leave_variables()
    assert variables == {"HOME": "/h"}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"MASTER_PORT": ""}, "not MASTER_PORT"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000. Ports are 1 to 65535"),
        ({"LOCAL_RANK": ""}, "but not LOCAL_RANK. torchrun sets them all"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK 4. There are"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK -1. There are"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE 5 and"),
        ({"LOCAL_WORLD_SIZE": "1"}, "LOCAL_WORLD_SIZE 1 and LOCAL_RANK 1"),
        ({"WORLD_SIZE": "1000000"}, "at most 10,000 processes"),
        ({"RANK": "4"}, "Ranks are 0 to"),
        ({"RANK": "one"}, "whole numbers"),
    ],
)
def test_half_a_launcher_is_told(environment, changed, told):
    environment(**(PLACE | changed))
    with pytest.raises(UserError, match=told):
        launched()


def in_trouble(path, error):
    """A process that the launcher has given this file ends by an error."""
    place = SimpleNamespace(error_file=str(path))
    with pytest.raises(type(error)), launcher_told(place, plain):
        raise error


def because_of(error, cause):
    error.__cause__ = cause
    return error


def test_torchrun_calls_who_failed_first_the_root_cause_in_its_own_words(tmp_path):
    """As torch itself reads what is written, where all ended in one second."""
    first = UserError("Reward `judge` raised ValueError (\x1b[31mred) on row 17.")
    lost = RankLost(f"Rank 1 (b) has ended the run: {first}")
    ends = [because_of(UserError(f"{lost} Go on."), lost), first, because_of(ToldElsewhere(), lost), Stopped(15)]
    for rank, error in enumerate(ends):
        in_trouble(tmp_path / f"{rank}.json", error)
    failures = {rank: ProcessFailure(rank, 100 + rank, 2, str(tmp_path / f"{rank}.json")) for rank in range(3)}
    said = ChildFailedError("grpo.run", failures)
    assert said.get_first_failure()[0] == 1
    root = str(said).partition("Root Cause")[2]
    assert "rank      : 1" in root and r"raised ValueError (\x1b[31mred) on row 17." in root and "\x1b" not in root
    assert (
        "Rank 1 (b) has ended the run: Reward `judge`"
        in ProcessFailure(2, 1, 2, str(tmp_path / "2.json")).message["message"]
    )
    assert "It was stopped by signal 15." in ProcessFailure(3, 1, 143, str(tmp_path / "3.json")).message["message"]


def test_a_launcher_that_wants_to_know_nothing_and_a_disk_that_is_full(tmp_path):
    in_trouble("", ValueError("a"))
    in_trouble(tmp_path / "gone" / "error.json", ValueError("a"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "own"), [(None, "1"), ("2,3", "3"), ("GPU-aa, GPU-bb", "GPU-bb"), ("5", "5"), ("", ""), ("-1", "-1")]
)
def test_a_process_sees_its_own_gpu_alone(environment, given, own):
    variables = environment(**PLACE, **({} if given is None else {"CUDA_VISIBLE_DEVICES": given}))
    take_own_gpu(launched())
    assert variables["CUDA_VISIBLE_DEVICES"] == own


def test_fewer_gpus_than_processes_are_told(environment):
    environment(**(PLACE | {"LOCAL_RANK": "2"}), CUDA_VISIBLE_DEVICES="0,1")
    with pytest.raises(UserError, match="2 GPUs, and this is process 3 of this host"):
        take_own_gpu(launched())


def test_a_base_that_is_rounded_otherwise_on_another_rank_is_told():
    """Each adapter would be the same, over different weights."""
    several = SimpleNamespace(gather=lambda mine: [mine, mine, [[], True]])
    with pytest.raises(UserError, match=r"Ranks 2 would keep .* --double-quant on or off"):
        Ranks.require_same(several, lambda: [[], False], rounded_otherwise)
    several.gather = lambda mine: [mine, mine]
    Ranks.require_same(several, lambda: [[], False], rounded_otherwise)


@pytest.mark.parametrize("name", ["Python", "torch", "transformers", "the SHA-256 of this package's code", "--seed"])
def test_a_process_that_runs_something_else_is_told(name):
    """Another version computes another adapter, or the same until it does not."""
    resolved = SimpleNamespace(config=Config(model="embedded", device="cpu"), task_sha256="1")
    several = SimpleNamespace(gather=lambda mine: [mine, mine, mine | {name: "another"}])
    with pytest.raises(UserError, match=rf"Rank 2 is not like the others: {name} is another there"):
        same_command(several, resolved, None)
    several.gather = lambda mine: [mine, mine]
    same_command(several, resolved, None)


class Beside:
    """A world of rank 0 and another one, whose values come from elsewhere."""

    def __init__(self, others):
        self.others = iter(others)

    def require_same(self, value, told):
        Ranks.require_same(SimpleNamespace(gather=lambda mine: [mine, next(self.others)]), value, told)


def asked(**fields):
    rows = [Prompt(i, "", [i, 7], {"question": "?", "answer": str(i), **fields}) for i in range(3)]
    return SimpleNamespace(train=rows, test=rows[:1])


def collected(questions):
    """What a rank tells the others of these questions."""
    told = []
    same_questions(SimpleNamespace(require_same=lambda value, _: told.append(value())), questions)
    return told


class Image:
    """Something that a column may hold; its repr differs from process to process."""


def test_other_prompts_and_other_answers_to_the_same_prompts_are_told():
    holds_itself = []
    holds_itself.append(holds_itself)
    odd = dict(image=Image(), names={"a", "b"}, nested={"x": [Image(), 1.5], (1, 2): 3}, loop=holds_itself, none=None)
    same_questions(Beside(collected(asked(**odd))), asked(**(odd | {"image": Image()})))
    with pytest.raises(UserError, match=r"ranks 1 have other columns in their rows than rank 0, such as other answers"):
        same_questions(Beside(collected(asked(answer="4"))), asked())
    fewer = asked()
    fewer.train = fewer.train[:2]
    with pytest.raises(UserError, match=r"The prompts of ranks 1 are not those of rank 0"):
        same_questions(Beside(collected(fewer)), asked())


def test_what_another_rank_has_ended_is_not_told_as_of_what_it_interrupted():
    lost = "Rank 1 (b) has ended the run: The judge is out."
    wrapped = UserError(f"The server at http://a: {lost} Go on with `x`.")
    assert str(as_told(lost, wrapped)) == f"{lost} Go on with `x`."
    assert str(as_told(lost, RankLost(lost))) == lost
    stopped = Stopped(15)
    stopped.add_note("Go on with `x`.")
    assert str(as_told(lost, stopped)) == f"{lost} Go on with `x`."
    assert str(as_told(lost, ValueError("a"))) == f"{lost} Then this rank ended: It failed with ValueError (a)."


def test_a_rank_that_shows_help_alone_is_told():
    with pytest.raises(UserError, match=r"Ranks 1, 2 have shown help, or .* All processes need the same command\."):
        Ranks.gather(SimpleNamespace(_exchange=lambda mine: [mine, Left(), Left()]), 1)
    assert Ranks.gather(SimpleNamespace(_exchange=lambda mine: [mine, 2]), 1) == [1, 2]
