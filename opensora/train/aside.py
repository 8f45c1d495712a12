"""Work between two steps: sample videos and suites of evaluation, on the averaged weights.

Ranks share it where each of them has a whole model, so that none waits long for another. Where
every call of the model needs all ranks, all do the same, and the first one's files are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from opensora.errors import NumericsError, OpensoraError
from opensora.runtime import ALONE, Runtime, log

Found = TypeVar("Found")
Work = Callable[[Path, Runtime], Found]
"""(folder of the run, place) -> what was found; ranks of the place share the work."""


class Told(OpensoraError):
    """Another rank could not go on, and all ranks know."""


@dataclass(frozen=True)
class Meeting(Runtime):
    """The ranks of a run, of which one that cannot go on tells the others where they meet next.

    So all of them leave the work, and go on with the training.
    """

    ranks: Runtime = field(default=ALONE, compare=False)

    @classmethod
    def of(cls, ranks: Runtime) -> Meeting:
        """The same place among the same ranks."""
        return cls(ranks.rank, ranks.world_size, ranks.local_rank, ranks.device, ranks=ranks)

    def gather_objects(self, value: Any) -> list[Any]:
        """As `Runtime` does.

        Raises:
            Told: one of the others has called `leave`.
        """
        met = self.ranks.gather_objects((value, ""))
        told = [f"rank {rank}: {reason}" for rank, (_, reason) in enumerate(met) if reason]
        if told:
            raise Told(told[0])
        return [value for value, _ in met]

    def barrier(self) -> None:
        self.gather_objects(None)

    def leave(self, error: OpensoraError) -> None:
        """Meet the others one last time, to tell them why."""
        self.ranks.gather_objects((None, str(error) or type(error).__name__))


def shared(work: Work[Found], output: Path, runtime: Runtime) -> Found | None:
    """The ranks share work. A disk that refuses it, or a suite that cannot judge, ends the work
    and not the run: it is told, and nothing was found."""
    place = Meeting.of(runtime)
    try:
        try:
            found = work(output, place)
            place.barrier()
        except Told:
            raise
        except OpensoraError as error:
            place.leave(error)
            raise
    except OpensoraError as error:
        return _told(error, runtime)
    return found


def by_all(work: Work[Found], output: Path, runtime: Runtime) -> Found | None:
    """Every rank does all of the work, because calls of the model are collective. What is found
    to be no number is told, and nothing was found: all ranks see the same, after the last call.

    Raises:
        OpensoraError: another one of this rank; the others could not know where it stopped.
    """
    place = replace(ALONE, device=runtime.device)
    try:
        if runtime.is_main:
            return work(output, place)
        with TemporaryDirectory() as nowhere:
            return work(Path(nowhere), place)
    except NumericsError as error:
        return _told(error, runtime)


def _told(error: OpensoraError, runtime: Runtime) -> None:
    if runtime.is_main:
        log.error("%s; training goes on without it", error)
