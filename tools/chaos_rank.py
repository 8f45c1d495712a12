"""One rank of `tools/chaos.py`: `opensora train` with a fault at a step of the first attempt.

CHAOS_FAULT is `kind:rank:step`; the moment of the fault goes to the file CHAOS_MOMENT.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from opensora.cli.main import main
from opensora.train.trainer import Trainer


def hang_with_the_lock() -> None:
    ctypes.PyDLL(None).sleep(3600)


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def send(number: signal.Signals, *, to_launcher: bool = False) -> Callable[[], None]:
    return lambda: os.kill(os.getppid() if to_launcher else os.getpid(), number)


def fill(trainer: Trainer) -> None:
    """Take what is left of a disk made for it, and give it back five steps later."""
    filler, step = trainer.config.output / "filler", trainer.progress.step
    with suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(65536))
    proceed = trainer._step

    def give_back(batch: Any) -> Any:
        if trainer.progress.step == step + 5:
            filler.unlink()
        return proceed(batch)

    trainer._step = give_back


AT_A_STEP: dict[str, Callable[[], None]] = {
    "hang": lambda: time.sleep(3600),
    "hang-with-lock": hang_with_the_lock,
    "stop": send(signal.SIGSTOP),
    "kill": send(signal.SIGKILL),
    "memory": run_out_of_memory,
    "term-rank": send(signal.SIGTERM),
    "term-launcher": send(signal.SIGTERM, to_launcher=True),
    "save-rank": send(signal.SIGUSR1),
    "save-launcher": send(signal.SIGUSR1, to_launcher=True),
}


def inject(kind: str, step: int) -> None:
    """Make this rank fail when it gets to a step, counted from 0."""
    whole_step, finish, loop = Trainer._step, Trainer._finish, Trainer._loop

    def faulty_step(trainer: Trainer, batch: Any) -> Any:
        if trainer.progress.step == step:
            now()
            if kind == "disk":
                fill(trainer)
            elif kind == "nan":
                poison(trainer)
            else:
                AT_A_STEP[kind]()
        return whole_step(trainer, batch)

    def faulty_finish(trainer: Trainer) -> None:
        now()
        os.kill(os.getpid(), signal.SIGKILL)
        finish(trainer)

    def ending_loop(trainer: Trainer, batches: Any, bar: Any) -> None:
        def short() -> Any:
            for _ in range(step):
                yield next(batches)
            now()

        loop(trainer, short(), bar)

    if kind == "kill-at-end":
        Trainer._finish = faulty_finish
    elif kind == "data-end":
        Trainer._loop = ending_loop
    else:
        Trainer._step = faulty_step


def poison(trainer: Trainer) -> None:
    """The next loss of this rank is not a number."""
    forward = trainer.task.forward

    def once(batch: Any, step: int) -> Any:
        trainer.task.forward = forward
        output = forward(batch, step)
        output.total.data.fill_(float("nan"))
        return output

    trainer.task.forward = once


def now() -> None:
    Path(os.environ["CHAOS_MOMENT"]).write_text(str(time.time()))


if __name__ == "__main__":
    kind, rank, step = os.environ["CHAOS_FAULT"].split(":")
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if kind != "none" and first and os.environ["RANK"] == rank:
        if kind == "kill-at-start":
            now()
            os.kill(os.getpid(), signal.SIGKILL)
        inject(kind, int(step))
    main(sys.argv[1:])
