"""A thread that notices when a rank makes no progress, and ends all ranks with their stacks.

The loop says `at(...)` wherever it gets to, which costs an assignment. A rank that stays at one
place beyond its limit, while no rank that it may be waiting for is still within its own, calls a
hang: every rank writes the stacks of its threads to hang/rank-N.txt and ends with code 124. A rank
that holds the interpreter's lock is written down and ended by a timer in C; one that is stopped is
ended by another rank of its host. No collective is used.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field

from opensora.config import Config
from opensora.errors import HANG, tell_launcher
from opensora.peers import PATIENCE_SECONDS, Mark, Peers, this_process

STAGES = ("start", "data", "compute", "update", "validation", "samples", "checkpoint")
"""The parts of a step in their order."""

_TIMER_SECONDS = 8.0
"""What the timer in C waits beyond the limit, so that a thread that can act comes first."""

_ANSWER_SECONDS = 11.0
"""What ranks have to write their stacks once a hang is called."""

_DEAD_SECONDS = 10.0
"""How long a rank may go on waiting for one of its own host that is gone."""


class WatchdogConfig(Config):
    """How long a rank may make no progress."""

    timeout: float = Field(
        default=600.0,
        ge=0,
        description="seconds that a part of a step may take; then all ranks write their stacks to "
        "<output>/hang and end with 124. 0 watches nothing",
    )
    long_timeout: float = Field(
        default=1800.0,
        gt=0,
        description="the same for what rightly takes longer: the start, a shape of batch that is "
        "new (compiling), validation, samples, checkpoints",
    )

    @property
    def collective_seconds(self) -> float:
        """What collectives wait, so that the watchdog, which knows more, comes first."""
        return max(600.0, self.timeout, self.long_timeout) + 60.0


class Watchdog:
    """Watches one rank; `at` is all that the watched thread calls.

    Args:
        folder: of the run; stacks go to its folder `hang`.
    """

    def __init__(self, config: WatchdogConfig, peers: Peers, folder: Path):
        self.config, self.peers = config, peers
        self.path = folder / "hang" / f"rank-{peers.rank}.txt"
        self._poll = min(1.0, max(0.05, config.timeout / 20))
        self._process = this_process()
        self._main = threading.main_thread().ident
        self._at = (time.monotonic(), 0, "start", config.long_timeout)
        self._seen = self._at
        self._forgiven = self._patient_until = 0.0
        self._ended, self._look_now, self._looked = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, step: int, stage: str, *, long: bool = False) -> None:
        """The watched thread gets to a stage of a step, counted from 1.

        Where less time is allowed than before, this waits until the timer in C and the other
        ranks know: a thread that takes the interpreter's lock next and keeps it would have had the
        longer time.

        Args:
            stage: one of STAGES.
            long: it may take `long_timeout`.
        """
        limit = self.config.long_timeout if long else self.config.timeout
        shorter = limit < self._at[3]
        self._at = (time.monotonic(), step, stage, limit)
        if shorter and self._thread.is_alive():
            self._be_seen()

    def _be_seen(self) -> None:
        """Have the watching thread look now; a store that does not answer is not waited for."""
        deadline = time.monotonic() + 2 * PATIENCE_SECONDS
        self._look_now.set()
        while self._seen is not self._at and (left := deadline - time.monotonic()) > 0:
            self._looked.wait(left)
            self._looked.clear()

    def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._arm(self.config.long_timeout)
        self._thread.start()

    def _arm(self, remaining: float) -> None:
        """Let C write the stacks and end the process where this thread cannot any more."""
        seconds = remaining + self._poll + _TIMER_SECONDS
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._file.fileno())

    def stop(self) -> None:
        """Watch no more; what was opened for stacks that did not come is removed."""
        self._ended.set()
        self._look_now.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        with suppress(OSError):
            if self.path.stat().st_size == 0:
                self.path.unlink()
            self.path.parent.rmdir()

    def _watch(self) -> None:
        looked, gone_since = time.monotonic(), 0.0
        while not self._wait():
            at = self._at
            now, mark, age = self._look(at, looked)
            looked = now
            self._arm(max(0.0, mark.limit - age))
            called = self.peers.tell(mark)
            self._seen = at
            self._looked.set()
            if called or (age > mark.limit and not self._awaits_somebody(mark)):
                self._end_hung(mark)
            if age < _DEAD_SECONDS / 2 or not self.peers.has_lost_a_neighbour():
                gone_since = 0.0
            elif not gone_since:
                gone_since = now
            elif now - gone_since > _DEAD_SECONDS:
                self._end_alone()

    def _wait(self) -> bool:
        """Until the next look is due; returns whether none is wanted any more."""
        self._look_now.wait(self._poll)
        self._look_now.clear()
        return self._ended.is_set()

    def _look(self, at: tuple[float, int, str, float], looked: float) -> tuple[float, Mark, float]:
        """Now, where the watched thread is, and for how long.

        Time in which this thread itself did not run, because the whole process was stopped, is
        not held against the other.
        """
        now = time.monotonic()
        late = now - looked - self._poll
        since, step, stage, limit = at
        if late > 5 * self._poll + 1:
            self._forgiven = now
        age = now - max(since, self._forgiven)
        clock, number = time.time(), STAGES.index(stage)
        return now, Mark(step, number, stage, clock - age, limit, clock, *self._process), age

    def _awaits_somebody(self, mine: Mark) -> bool:
        """Whether a rank that is not further may still take its time.

        Where one may, all ranks ask again only now and then.
        """
        now = time.time()
        if time.monotonic() < self._patient_until:
            return True
        others = [m for rank, m in self.peers.marks().items() if rank != self.peers.rank]
        awaits = any(m.place <= mine.place and now < m.since + m.limit for m in others)
        if awaits:
            self._patient_until = time.monotonic() + self.config.timeout / 60
        return awaits

    def _end_hung(self, mine: Mark) -> NoReturn:
        """Write the stacks, wait for those of the others, tell who is behind, and leave."""
        mine = replace(mine, where=_position(sys._current_frames().get(self._main or 0)))
        self.peers.call_hang()
        self.peers.tell(mine)
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        _write(
            self._file,
            f"{moment} rank {self.peers.rank}: no progress; {_told(self.peers.rank, mine)}\n",
        )
        faulthandler.dump_traceback(self._file, all_threads=True)
        faulthandler.cancel_dump_traceback_later()
        deadline = time.monotonic() + _ANSWER_SECONDS
        marks = {self.peers.rank: mine}
        while time.monotonic() < deadline:
            marks = {**self.peers.marks(), self.peers.rank: mine}
            answered = all(mark.where or mark.is_dead() for mark in marks.values())
            if answered and len(marks) == self.peers.world_size:
                break
            time.sleep(0.1)
        if min(rank for rank, mark in marks.items() if mark.where) == self.peers.rank:
            print(
                f"opensora: {verdict(marks)}; see {self.path.parent}", file=sys.stderr, flush=True
            )
        self._end_silent(marks)
        tell_launcher(HANG)
        os._exit(HANG)

    def _end_silent(self, marks: dict[int, Mark]) -> None:
        """End the ranks of this host that did not answer: a stopped process hears nothing else."""
        for rank, mark in marks.items():
            if mark.where or not mark.is_local or not mark.born or mark.is_dead():
                continue
            state = _state(mark.pid)
            with suppress(OSError):
                os.kill(mark.pid, signal.SIGKILL)
                with open(self.path.with_name(f"rank-{rank}.txt"), "a", encoding="utf-8") as file:
                    _write(
                        file, f"{_told(rank, mark)}; it did not answer ({state}) and was ended\n"
                    )

    def _end_alone(self) -> NoReturn:
        """A rank of this host is gone, and what this one waits in does not notice."""
        error = self.peers.explain(RuntimeError("its process is gone"))
        print(f"opensora: {error}", file=sys.stderr, flush=True)
        tell_launcher(error.exit_code)
        os._exit(error.exit_code)


def verdict(marks: dict[int, Mark]) -> str:
    """One line about a hang: who is behind, and where each rank is.

    Behind is who did not answer, or else who is least far and does not wait for others itself.
    """
    ranks = sorted(marks)
    silent = [rank for rank in ranks if not marks[rank].where]
    least = min(mark.place for mark in marks.values())
    last = [rank for rank in ranks if marks[rank].place == least]
    busy = [rank for rank in last if not _waits(marks[rank].where)]
    behind = silent or busy or last
    names = ", ".join(map(str, behind[:8]))
    subject = f"rank {names} is" if len(behind) == 1 else f"ranks {names} are"
    age = min(mark.told - mark.since for mark in marks.values() if mark.where)
    shown = [*behind, *(rank for rank in ranks if rank not in behind)][:8]
    places = "; ".join(_told(rank, marks[rank]) for rank in shown)
    return f"no progress for {age:.0f} s, {subject} behind: {places}"


def _told(rank: int, mark: Mark) -> str:
    where = mark.where or "does not answer"
    return f"rank {rank} at step {mark.step}, {mark.doing} ({where})"


def _position(frame: Any) -> str:
    """The innermost line of a stack, and whether it waits for other ranks there.

    Collectives are called from files of torch.distributed; the backward pass of a rank that waits
    for gradients of others has no Python frame within it.
    """
    if frame is None:
        return "outside Python"
    code, files = frame.f_code, []
    place = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    waits = code.co_name == "_engine_run_backward" or any("torch/distributed/" in f for f in files)
    return f"{_WAITS} in {place}" if waits else f"in {place}"


_WAITS = "waiting for others"


def _waits(where: str) -> bool:
    return where.startswith(_WAITS)


def _state(pid: int) -> str:
    """What Linux says of a process: 'T (stopped)', 'D (disk sleep)'."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("State:"):
                return line.partition(":")[2].strip()
    return "state unknown"


def _write(file: Any, text: str) -> None:
    with suppress(OSError):
        file.write(text)
        file.flush()


@contextmanager
def watching(config: WatchdogConfig, peers: Peers, folder: Path) -> Iterator[Watchdog]:
    """Watch the calling thread inside the block."""
    watchdog = Watchdog(config, peers, folder)
    if not config.timeout:
        yield watchdog
        return
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.stop()
