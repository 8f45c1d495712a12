"""Requests from outside: SIGTERM and SIGINT stop after a save, SIGUSR1 saves and goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from opensora import interrupts
from opensora.errors import Preempted


@dataclass(frozen=True)
class Asked:
    """What is asked of a run: to stop, to save and go on, or nothing."""

    stop: bool = False
    save: bool = False


@dataclass
class Requests:
    """What the signals asked of this process.

    Handlers only count, and only the reader remembers what it has served, so that no request is
    lost between a look and a reset.
    """

    stops: int = 0
    saves: int = 0
    _served: int = 0

    def take(self) -> Asked:
        """What is asked now. A wish to save is told once, a wish to stop for ever."""
        saves = self.saves
        fresh, self._served = saves > self._served, saves
        return Asked(self.stops > 0, fresh)


@contextmanager
def listening() -> Iterator[Requests]:
    """Handle the signals inside the block; a second stop signal exits at once with code 75."""
    interrupts.check()
    requests = Requests()

    def on_stop(number: int, frame: object) -> None:
        if requests.stops:
            os._exit(Preempted.exit_code)
        requests.stops += 1

    def on_save(number: int, frame: object) -> None:
        requests.saves += 1

    handlers = {signal.SIGTERM: on_stop, signal.SIGINT: on_stop, signal.SIGUSR1: on_save}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
