"""A World of several threads of one process, for tests of what ranks do together. No test is here.

What is collected comes as late as it may: until it is waited for, there is something else in its place.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from grpo.world import World

PATIENCE = 60  # seconds, after which ranks that wait for different things are told so


class Table:
    """Where so many ranks put down what they have."""

    def __init__(self, size):
        self.size, self.places = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)

    def exchange(self, rank, value):
        self.places[rank] = value
        self.barrier.wait()
        found = list(self.places)
        self.barrier.wait()
        return found


class Thread(World):
    """One of the ranks at a table."""

    def __init__(self, rank, table):
        self.rank, self.size, self.table = rank, table.size, table
        self.ready = lambda: None
        self.collected = 0

    def gather(self, value):
        self.ready()
        kinds, values = zip(*self.table.exchange(self.rank, ("gather", value)), strict=True)
        assert set(kinds) == {"gather"}, kinds
        return list(values)

    def largest(self, number):
        kinds, numbers = zip(*self.table.exchange(self.rank, ("largest", number)), strict=True)
        assert set(kinds) == {"largest"}, kinds
        return max(numbers)

    def collect(self, part, whole):
        kinds, parts = zip(*self.table.exchange(self.rank, ("collect", part)), strict=True)
        assert set(kinds) == {"collect"} and len({len(each) for each in parts}) == 1, kinds
        whole.fill_(0xAB)
        self.collected += 1
        return lambda: whole.copy_(torch.cat(parts))

    def before_meeting(self, ready):
        self.ready = ready


def together(size, work):
    """What `work` gives for the world of each of so many ranks. What one raises is raised here."""
    table = Table(size)

    def of_rank(rank):
        try:
            return work(Thread(rank, table))
        except BaseException:
            table.barrier.abort()  # nobody waits for it
            raise

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(of_rank, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]
