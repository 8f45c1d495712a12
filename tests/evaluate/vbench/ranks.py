"""Ranks that are threads, so that sharing is tested without a process group."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

from opensora.peers import Peers
from opensora.runtime import Runtime


class Meeting:
    """What ranks that are threads share in place of a process group."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=60)
        self.values: dict[int, object] = {}


@dataclass(frozen=True)
class Rank(Runtime):
    """A rank that is a thread."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1), compare=False)

    def barrier(self) -> None:
        self.meeting.barrier.wait()

    def gather_objects(self, value):
        self.meeting.values[self.rank] = value
        self.barrier()
        found = [self.meeting.values[rank] for rank in range(self.world_size)]
        self.barrier()
        return found


def on_ranks(size, run):
    """run(place) on each of `size` ranks; their answers in rank order."""
    meeting, answers = Meeting(size), {}

    def one(rank):
        try:
            answers[rank] = run(
                Rank(rank, size, rank, torch.device("cpu"), Peers(), meeting=meeting)
            )
        except BaseException as error:
            meeting.barrier.abort()
            answers[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[rank] for rank in range(size)]
