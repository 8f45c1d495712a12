"""torchrun with what a training needs of it: `python -m opensora.cli.launch [OPTIONS] SCRIPT ...`.

The options are torchrun's. Beyond it, SIGUSR1 reaches the ranks (torchrun itself would die of it),
refusals are not tried again, and the launcher ends with the run's own exit code, where torchrun's
is 1 whatever its workers say.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from opensora.errors import HANG, LostRank, Preempted

CAUSES = (64, 65, 66, 70, 71, 74, HANG, LostRank.exit_code, Preempted.exit_code)
"""Of the codes that ranks end with, the one that says most comes first."""


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun with `arguments`; returns the exit code of the run."""
    signal.signal(signal.SIGUSR1, _pass_on)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    failed, stopped = False, False
    with tempfile.TemporaryDirectory(prefix="opensora-") as folder:
        told = Path(folder) / "codes"
        os.environ["OPENSORA_EXIT_FILE"] = str(told)
        try:
            run.run(run.parse_args(sys.argv[1:] if arguments is None else arguments))
        except ChildFailedError:
            failed = True
        except SignalException:
            stopped = True
        lines = told.read_text().splitlines() if told.exists() else []
    return outcome(lines, failed=failed, stopped=stopped)


def outcome(lines: Iterable[str], *, failed: bool, stopped: bool) -> int:
    """The exit code of a run.

    Args:
        lines: 'attempt code', as the ranks left them.
        failed: a rank of the last attempt died or left a code that might be mended.
        stopped: the launcher itself was told to stop.
    """
    entries = [tuple(map(int, line.split())) for line in lines]
    last = max((attempt for attempt, _ in entries), default=0)
    codes = {code for attempt, code in entries if attempt == last} - {0}
    if failed:  # a rank that is stopped because another one died was not pre-empted
        codes.discard(Preempted.exit_code)
    for code in CAUSES:
        if code in codes:
            return code
    if codes:
        return max(codes)
    if stopped:
        return Preempted.exit_code
    return 1 if failed else 0


def _pass_on(number: int, frame: object) -> None:
    """To the ranks of this node that listen already: another one would die of it, and has nothing
    to save. Data loaders are children of ranks, not of this process."""
    for tasks in Path("/proc/self/task").glob("*/children"):
        for pid in tasks.read_text().split():
            with suppress(OSError):
                if _catches(int(pid), number):
                    os.kill(int(pid), number)


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


if __name__ == "__main__":
    sys.exit(main())
