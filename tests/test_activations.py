"""Tensors that wait in the host's memory, on streams that only note what is asked of them: what comes back is what
went, once, in an order that no other stream's work can spoil."""

import weakref
from contextlib import nullcontext

import pytest
import torch

from grpo.policy import activations
from grpo.policy.activations import Offload, Parked, Remembered


class Stream:
    """Notes, in one list with the others, who waits for what."""

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def wait_stream(self, other):
        self.notes.append((self.name, "waits for", other.name))

    def record_event(self):
        self.notes.append((self.name, "records", len(self.notes)))
        return len(self.notes) - 1

    def wait_event(self, event):
        self.notes.append((self.name, "waits for", event))


@pytest.fixture
def streams(monkeypatch):
    """(the computation's, the one beside it, their notes); pinned memory is any."""
    notes = []
    computation, beside = Stream("computation", notes), Stream("beside", notes)
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: computation)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **options: empty(*sizes, **options))
    monkeypatch.setattr(activations, "PIECE", 64)
    return computation, beside, notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (16,), (5, 7), (3, 2, 11), (64, 4)])
def test_it_comes_back_as_it_went(shape, dtype, streams):
    _, beside, _ = streams
    for x in (torch.randn(shape).to(dtype), torch.randn(shape[::-1]).to(dtype).permute(*range(len(shape))[::-1])):
        parked = Parked(x, beside, [])
        assert {piece.nbytes for piece in parked.there} == {64}  # of one size, whatever the tensor's
        kept = x.clone()
        parked.leave()
        x.zero_()
        back = parked.taken_back()
        assert torch.equal(back, kept) and back.shape == kept.shape and back.is_contiguous()


def test_each_stream_waits_for_the_other_where_memory_changes_hands(streams):
    _, beside, notes = streams
    parked = Parked(torch.randn(40), beside, [])
    assert notes == [("beside", "waits for", "computation"), ("beside", "records", 1)]  # it is computed, then copied
    parked.leave()
    parked.leave()
    assert notes[2:] == [("computation", "waits for", 1)]  # copied, then its memory is somebody else's
    parked.taken_back()
    assert notes[3:] == [
        ("beside", "waits for", "computation"),  # who had the new memory before is done with it
        ("beside", "records", 4),
        ("computation", "waits for", 4),
    ]


def test_what_is_given_up_half_way_is_waited_for(streams):
    _, beside, notes = streams
    parked = Parked(torch.randn(4), beside, [])
    parked.fetch()
    gone, come = (at for _, what, at in notes if what == "records")
    notes.clear()
    del parked
    assert notes == [("computation", "waits for", gone), ("computation", "waits for", come)]


def test_memory_that_runs_out_while_it_is_parked_is_no_other_error(streams, monkeypatch, recwarn):
    def out_of_memory(*_sizes, **_options):
        raise torch.OutOfMemoryError("out of memory")

    unraised = []
    monkeypatch.setattr("sys.unraisablehook", unraised.append)
    monkeypatch.setattr(torch, "empty", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        Parked(torch.randn(4), streams[1], [])
    assert not unraised


def test_the_layer_before_is_fetched_once_with_all_that_it_has_parked(streams):
    _, beside, _ = streams
    before = [Parked(torch.randn(4), beside, []) for _ in range(3)]
    parked = [Parked(torch.randn(4), beside, [weakref.ref(each) for each in before]) for _ in range(2)]
    parked[0].taken_back()
    first = [each.here for each in before]
    assert all(first)
    parked[1].taken_back()
    assert [each.here for each in before] == first


def test_what_attention_gave_is_told_once_and_not_without_gradient():
    offload = Offload(torch.device("cpu"))
    memory, given = Remembered(offload), (torch.randn(3), torch.randn(2))
    assert memory.recall() is None
    with torch.no_grad():
        memory.keep(*given)
    assert memory.recall() is None
    memory.keep(*given)
    assert all(map(torch.equal, memory.recall(), given))
    assert memory.recall() is None
