"""Requests from outside: SIGTERM and SIGINT stop after a save, SIGUSR1 saves and goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from opensora.runtime import Runtime


@dataclass
class Requests:
    """What has been asked of this process since it was last looked at."""

    stop: bool = False
    save: bool = False

    def agreed(self, runtime: Runtime) -> Requests:
        """The same answer on every rank: what any of them was asked."""
        asked = torch.tensor([float(self.stop), float(self.save)])
        stop, save = runtime.all_reduce(asked, "max").tolist()
        self.save = False
        return Requests(bool(stop), bool(save))


@contextmanager
def listening() -> Iterator[Requests]:
    """Handle the signals inside the block; a second stop signal exits at once with code 75."""
    requests = Requests()

    def on_stop(number: int, frame: object) -> None:
        if requests.stop:
            os._exit(75)
        requests.stop = True

    def on_save(number: int, frame: object) -> None:
        requests.save = True

    handlers = {signal.SIGTERM: on_stop, signal.SIGINT: on_stop, signal.SIGUSR1: on_save}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
