"""What can go wrong, and the exit code that each kind ends the process with.

One line tells the user what, where and how to mend it; `cli` prints that line and exits with the
class's code. The classes also inherit the built-in that a library caller would expect to catch.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType


class OpensoraError(Exception):
    """Base of every error that is told to the user in one line rather than as a traceback."""

    exit_code = 70


class UsageError(OpensoraError, ValueError):
    """A command line or a config that cannot be carried out (exit 64)."""

    exit_code = 64


class MissingPackageError(UsageError, ImportError):
    """An optional package is needed and absent (exit 64)."""


class DataError(OpensoraError, ValueError):
    """A manifest, clip or cache that cannot be used (exit 65)."""

    exit_code = 65


class CheckpointError(OpensoraError, ValueError):
    """A checkpoint that is torn, damaged or does not fit (exit 66)."""

    exit_code = 66


class LostRank(OpensoraError):
    """Another rank died or cannot be reached; the same command goes on (exit 69).

    Args:
        exit_code: of the other rank's own error, where it left one.
    """

    exit_code = 69

    def __init__(self, message: str, *, exit_code: int = 69):
        super().__init__(message)
        self.exit_code = exit_code


class NumericsError(OpensoraError, ArithmeticError):
    """Training, or a model that is judged, left the finite numbers (exit 70)."""

    exit_code = 70


class OutOfMemory(OpensoraError, MemoryError):
    """A device or the host had no memory left for a step (exit 71)."""

    exit_code = 71


class StorageError(OpensoraError, OSError):
    """The disk is full, read-only or failing (exit 74)."""

    exit_code = 74


class Preempted(OpensoraError):
    """Stopped by a signal after saving; the same command resumes (exit 75)."""

    exit_code = 75


HANG = 124
"""The exit code of a rank that the watchdog ended."""

RESTARTABLE = (LostRank.exit_code, HANG)
"""Codes of a rank after which the same command, started at once, has a chance."""


def tell_launcher(code: int) -> bool:
    """Leave an exit code where `opensora.cli.launch` asks for it: torchrun keeps no worker's.

    Returns:
        Whether it was told.
    """
    path = os.environ.get("OPENSORA_EXIT_FILE")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if not path:
        return False
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{attempt} {code}\n")
    except OSError:  # the process's own code is told all the same
        return False
    return True


def closest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate nearest to `name` in spelling, or None when nothing is near."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """A phrase to append to an error: the nearest candidate, or the whole (short) list."""
    candidates = sorted(candidates)
    nearest = closest(name, candidates)
    if nearest is not None:
        return f" Did you mean '{nearest}'?"
    return f" Known: {', '.join(candidates)}." if candidates else ""


_TORCHAO = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "torchao.kernel.intmm": ("Detected no triton",),
    "torch.utils._pytree": ("is an Enum subclass and is now natively supported",),
}
"""Logger -> parts of what is logged where torchao is imported: kernels that it has for another
build, and how it registers its own classes. Nobody who draws a video can mend either."""


@contextmanager
def _without_torchao() -> Iterator[None]:
    """Inside the block those lines are not logged; all others are."""

    def heard(record: logging.LogRecord) -> bool:
        return not any(part in record.getMessage() for part in _TORCHAO[record.name])

    loggers = [logging.getLogger(name) for name in _TORCHAO]
    for logger in loggers:
        logger.addFilter(heard)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(heard)


def require(package: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package by its dotted name, or say which extra brings it.

    Raises:
        MissingPackageError: naming the package, what it is for, and the command that installs it.
    """
    try:
        with _without_torchao():
            if package == "transformers":  # its models would import torchao later, with a word
                with suppress(Exception):
                    importlib.import_module("transformers.modeling_utils")
            return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f"{purpose} needs the package '{package.partition('.')[0]}', which cannot be imported "
            f"({error}). Install it with: pip install 'opensora[{extra}]'"
        ) from error
