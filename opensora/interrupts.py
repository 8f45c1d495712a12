"""SIGTERM and SIGINT until a command listens for itself: they end it as Ctrl-C does.

The exception may be raised where nobody can catch it: in a weak reference's callback or a
`__del__`, which Python runs between any two lines, or in C code that swallows it (pydantic's
validators do, in their constructor). Python tells of the first kind, and the signal is given once
more; for the second, what was asked is remembered, and looked up before anything that waits for
others.
"""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any, NoReturn

_AGAIN_AFTER = 0.01  # seconds: long enough for the callback to have returned, mostly
_received: list[int] = []
_hooks: list[Any] = []  # sys.unraisablehook before `listen`


def interrupt(number: int, frame: object) -> NoReturn:
    """The handler of both signals."""
    _received.append(number)
    raise KeyboardInterrupt


def listen() -> None:
    """Handle both signals so from now on."""
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    if sys.unraisablehook is not _unraisable:
        _hooks.append(sys.unraisablehook)
        sys.unraisablehook = _unraisable


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


def _unraisable(told: Any) -> None:
    """Where the exception of `interrupt` was dropped, raise it again soon, and tell nobody."""
    if not (_received and told.exc_type is KeyboardInterrupt):
        _hooks[-1](told)
        return
    timer = threading.Timer(_AGAIN_AFTER, _again)
    timer.daemon = True
    timer.start()


def _again() -> None:
    """Give the signal once more, unless another handler has taken over; that one looks with
    `check` when it does."""
    thread = threading.main_thread().ident
    if thread is not None and signal.getsignal(_received[0]) is interrupt:
        signal.pthread_kill(thread, _received[0])  # to that thread, so that a wait there ends
