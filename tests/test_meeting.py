"""How the processes of a launch find each other, and who is missed before they have. Ranks are threads here, over a
store in memory; processes that are killed meanwhile are in test_ranks_end.py and kill_ranks.py."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from grpo import meeting
from grpo.errors import Stopped, UserError
from grpo.launcher import Place
from grpo.meeting import COUNT, NAME, Meeting, connect, meet
from grpo.pulse import HOST, SILENT, tell_the_end


def place_of(rank, size=2, by_agent=False, local_size=None, port=1):
    return Place(rank, size, rank, "127.0.0.1", port, by_agent, size if local_size is None else local_size)


@pytest.fixture
def store():
    return torch.distributed.HashStore()


@pytest.fixture
def impatient(monkeypatch):
    """All that takes time takes less of it."""

    def set_to(**seconds):
        for name, value in ({"BEAT": 0.01, "PAUSE": 0.001} | seconds).items():
            monkeypatch.setattr(meeting, name, value)

    return set_to


def agreed(store, places):
    with ThreadPoolExecutor(len(places)) as threads:
        return list(threads.map(lambda place: Meeting(store, place).agree(), places))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_find_the_same_name_and_no_others_do(size, store):
    found = agreed(store, [place_of(rank, size) for rank in range(size)])
    assert len(set(found)) == 1
    assert not set(agreed(store, [place_of(rank, size) for rank in range(size)])) & set(found)


def test_processes_that_these_were_started_in_the_place_of_are_not_taken_for_them(store, impatient):
    """An earlier rank 1 is in the store, and said why it went; its successor comes late."""
    impatient(SILENCE=0.05, NEIGHBOUR=30)
    places = [place_of(rank, by_agent=True) for rank in range(2)]
    Meeting(store, places[1]).leave("It was another launch.")
    first = Meeting(store, places[0])
    looked = threading.Event()
    look = first._look

    def looks():
        look()
        if first.counts:
            looked.set()

    first._look = looks
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(first.agree)
        looked.wait()
        assert threads.submit(Meeting(store, places[1]).agree).result() == waiting.result()


def test_one_that_ends_tells_those_who_wait(store, impatient):
    impatient(NEIGHBOUR=30)
    Meeting(store, place_of(1)).leave("It was stopped by signal 15.")
    with pytest.raises(
        UserError, match=r"Rank 1 \(.*\) was gone before all ranks had met: It was stopped by signal 15"
    ):
        Meeting(store, place_of(0, 3)).agree()


@pytest.mark.parametrize("by_agent", [False, True])
def test_one_that_is_killed_while_it_waits_is_missed(by_agent, store, impatient):
    """It has named itself, and counts no more."""
    impatient(SILENCE=0.2, NEIGHBOUR=30)
    gone, waits = Meeting(store, place_of(1, 3, by_agent)), Meeting(store, place_of(0, 3, by_agent))
    waits._look()
    store.add(COUNT.format(gone.mine), 1)
    with pytest.raises(UserError, match=r"Rank 1 .*: Nothing was heard of it"):
        waits.agree()


def test_one_of_this_host_that_never_comes_is_waited_for_a_while(store, impatient):
    impatient(NEIGHBOUR=0.1)
    with pytest.raises(UserError, match=r"Of the 2 processes of this host \(.*\) 1 came .* there were 0\."):
        Meeting(store, place_of(0)).agree()


def test_another_host_is_waited_for_longer(store, impatient):
    impatient(NEIGHBOUR=0.1, ARRIVAL=0.4)
    with pytest.raises(UserError, match=r"Of 2 processes only ranks 0 came within 0.4 s"):
        Meeting(store, place_of(0, local_size=1)).agree()


def test_who_was_stopped_itself_calls_nobody_silent(store, impatient):
    impatient(SILENCE=5, NEIGHBOUR=1000, ARRIVAL=1000)
    Meeting(store, place_of(1, 3))
    waits = Meeting(store, place_of(0, 3))
    waits._look()
    for name in waits.moved:
        waits.moved[name] -= 100
    waits.looked -= 100
    waits._look()  # it has only now come back itself
    for name in waits.moved:
        waits.moved[name] -= 100
    with pytest.raises(UserError, match="Nothing was heard"):
        waits._look()


def test_what_ends_a_process_that_waits_is_told_by_its_sentence(impatient, monkeypatch):
    """Over a store of torch's, of which rank 0 takes none along before it was heard."""
    impatient(NEIGHBOUR=30)
    host = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    place = place_of(1, 3, by_agent=True, port=host.port)

    def stopped(*_):
        raise Stopped(15)

    monkeypatch.setattr(Meeting, "_look", stopped)
    with pytest.raises(Stopped):
        meet(place)
    name = host.get(NAME.format(1)).decode()
    assert host.get(meeting.GONE.format(name)) == b"It was stopped by signal 15."


def test_a_store_that_nobody_has_is_looked_for_a_while(impatient):
    impatient(NEIGHBOUR=0.05)
    host = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    free = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    port = free.port
    del free
    with pytest.raises(UserError, match=rf"Rank 1 did not find the others at 127.0.0.1:{port}: ConnectionRefusedError"):
        meet(place_of(1, port=port))
    assert connect(place_of(1, port=host.port), is_host=False).num_keys() >= 0


def test_of_two_ends_the_first_counts(store):
    """Who ends after it is told what it was; of its own only what it cannot know."""
    for rank in (0, 1):
        store.set(HOST.format(rank), f"host-{rank}")
    assert tell_the_end(store, 1, "The judge is out.") == ""
    assert tell_the_end(store, 0, "Another.") == "Rank 1 (host-1) has ended the run: The judge is out."
    assert tell_the_end(store, 1, "The judge is out.") == "" == tell_the_end(store, 1, "Another.")
    silent = torch.distributed.HashStore()
    assert tell_the_end(silent, 1, SILENT) == ""  # said of it by another
    assert tell_the_end(silent, 1, "It is back.").endswith("nothing was heard of rank 1 for a while.")
