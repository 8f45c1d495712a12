"""SIGTERM and SIGINT until a command listens for itself: they end it as Ctrl-C does.

The exception may be raised while C code runs that swallows it (pydantic's validators do, in their
constructor). So what was asked is remembered, and looked up before anything that waits for others.
"""

from __future__ import annotations

import signal
from typing import NoReturn

_received: list[int] = []


def interrupt(number: int, frame: object) -> NoReturn:
    """The handler of both signals."""
    _received.append(number)
    raise KeyboardInterrupt


def listen() -> None:
    """Handle both signals so from now on."""
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)


def ignore() -> None:
    """Ignore both signals from now on, where they were listened for: the outcome stands, and
    torchrun, which may not know it yet, must not change it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is interrupt:
            signal.signal(number, signal.SIG_IGN)


def check() -> None:
    """End here where a signal has come already.

    Raises:
        KeyboardInterrupt: a signal has come.
    """
    if _received:
        raise KeyboardInterrupt
