"""What ranks tell each other without a collective: how far they are, and their last words.

A collective waits for everybody, so it cannot say who is missing. The store where the ranks met
can: a thread of the launcher serves it, and answers while ranks hang or die. A store that does not
answer is not waited for long.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from opensora.errors import LostRank, OpensoraError

if TYPE_CHECKING:
    from torch.distributed import Store

Answer = TypeVar("Answer")

PATIENCE_SECONDS = 2.0
"""How long the store may take to answer."""

WORDS_SECONDS = 4.0
"""How long the others wait for the last words of a rank that is gone."""


@dataclass(frozen=True)
class Mark:
    """How far a rank was when it last told.

    Attributes:
        step, stage: its place in the run; stages of a step are numbered in their order.
        doing: the stage in words.
        since: when it got there, in seconds since 1970.
        limit: seconds that it may stay there.
        told: when it told this, in seconds since 1970.
        host: for people; hosts may share a name.
        node, pid, born: its process; `born` tells it from a later one of the same number.
        where: the line that its main thread is at, once it was asked.
    """

    step: int
    stage: int
    doing: str
    since: float
    limit: float
    told: float
    host: str
    node: str
    pid: int
    born: str
    where: str = ""

    @property
    def place(self) -> tuple[int, int]:
        return self.step, self.stage

    @property
    def is_local(self) -> bool:
        return self.node == node()

    def is_dead(self) -> bool:
        """Whether the process is known to be gone; on another host nothing is known."""
        return self.is_local and bool(self.born) and birth(self.pid) != self.born


class Peers:
    """The ranks of a run, as one of them knows the others.

    Args:
        store: a connection of its own to where the ranks met; None for a rank alone.
        neighbours: the ranks of this host.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        store: Store | None = None,
        neighbours: Sequence[int] = (),
    ):
        self.rank, self.world_size, self._store = rank, world_size, store
        self.neighbours = neighbours
        self._asking: threading.Thread | None = None

    def greet(self) -> None:
        """Tell the others which process this rank is, before it gets anywhere."""
        clock = time.time()
        self.tell(Mark(0, 0, "start", clock, 0.0, clock, *this_process()))

    def tell(self, mark: Mark) -> bool:
        """Tell the others how far this rank is; returns whether one of them has called a hang."""

        def work(store: Store) -> bool:
            store.set(f"mark/{self.rank}", json.dumps(asdict(mark)))
            return store.check(["hang"])

        return self._ask(work, False)

    def call_hang(self) -> None:
        """Make every rank write down where it is, and end."""
        self._ask(lambda store: store.set("hang", str(self.rank)), None)

    def marks(self, ranks: Sequence[int] | None = None) -> dict[int, Mark]:
        """How far `ranks` are, by default all, of those that ever told."""
        found = self._ask(lambda store: self._read(store, "mark", ranks), {})
        return {rank: Mark(**mark) for rank, mark in found.items()}

    def has_lost_a_neighbour(self) -> bool:
        """Whether a process of a rank of this host is gone."""
        return any(mark.is_dead() for mark in self.marks(self.neighbours).values())

    def say(self, code: int, line: str) -> None:
        """This rank's last words: the exit code it ends with, and why."""
        words = json.dumps({"code": code, "line": line})
        self._ask(lambda store: store.set(f"words/{self.rank}", words), None)

    def words(self) -> dict[int, tuple[int, str]]:
        """rank -> (exit code, line) of the ranks that have said their last words."""
        found = self._ask(lambda store: self._read(store, "words"), {})
        return {rank: (said["code"], said["line"]) for rank, said in found.items()}

    def explain(self, error: Exception) -> LostRank:
        """Which rank is gone and why, in place of what broke here because of it.

        The code is that of the rank's own error, so that all ranks end alike.
        """
        self.say(LostRank.exit_code, "")
        deadline, ends = time.monotonic() + WORDS_SECONDS, self.words()
        while time.monotonic() < deadline:
            ends = self.words()
            told = [(rank, end) for rank, end in sorted(ends.items()) if end[1]]
            if told:
                rank, (code, line) = told[0]
                return LostRank(f"rank {rank}: {line}", exit_code=code)
            if any(mark.is_dead() for rank, mark in self.marks().items() if rank not in ends):
                break
            time.sleep(0.1)
        silent = [_described(r, m) for r, m in sorted(self.marks().items()) if r not in ends]
        missing = ", ".join(silent[:4]) or "another rank, which never told anything"
        reason = " ".join(str(error).split())[:200]
        return LostRank(
            f"lost {missing} ({reason}). Run the same command again to go on from the last "
            "checkpoint; torchrun --max-restarts does it by itself"
        )

    def _read(self, store: Store, kind: str, ranks: Sequence[int] | None = None) -> dict[int, Any]:
        """Everything of a kind that is there, in as few questions as can be."""
        keys = {rank: f"{kind}/{rank}" for rank in (ranks or range(self.world_size))}
        if not store.check(list(keys.values())):
            keys = {rank: key for rank, key in keys.items() if store.check([key])}
        values = store.multi_get(list(keys.values())) if keys else []
        return {rank: json.loads(value) for rank, value in zip(keys, values, strict=True)}

    def _ask(self, question: Callable[[Store], Answer], default: Answer) -> Answer:
        """The store's answer, or `default` where it has none or takes too long.

        The store's client waits without end for a server that is stopped, so a thread waits for it.
        """
        store = self._store
        if store is None or (self._asking is not None and self._asking.is_alive()):
            return default
        answers = [default]

        def work() -> None:
            with suppress(RuntimeError, ValueError):
                answers[0] = question(store)

        asking = threading.Thread(target=work, name="ask-store", daemon=True)
        asking.start()
        self._asking = asking  # the watchdog's thread may put its own here
        asking.join(PATIENCE_SECONDS)
        return answers[0]


@contextmanager
def ending_alike(peers: Peers) -> Iterator[None]:
    """Inside the block, what ends one rank ends the others with its line and exit code.

    Raises:
        LostRank: here, because another rank is gone.
    """
    try:
        yield
    except OpensoraError as error:
        peers.say(error.exit_code, str(error))
        raise
    except Exception as error:
        if peers.world_size > 1 and broke_a_connection(error):
            raise peers.explain(error) from error
        peers.say(LostRank.exit_code, f"{type(error).__name__}: {error}")
        raise


def broke_a_connection(error: Exception) -> bool:
    """Whether an exception says that another rank could not be reached.

    gloo has no class of its own: its errors are RuntimeErrors that name its source file (torch
    2.13: "[.../gloo/transport/tcp/pair.cc:547] Connection closed by peer").
    """
    import torch.distributed

    if isinstance(error, torch.distributed.DistError):
        return True
    words = ("gloo/", "Gloo ", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@cache
def node() -> str:
    """What the process numbers seen here belong to: a boot of a machine, and a namespace on it."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def this_process() -> tuple[str, str, int, str]:
    """host, node, pid and birth of this process, as a mark has them."""
    return socket.gethostname(), node(), os.getpid(), birth(os.getpid())


def birth(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty where it is gone or cannot be known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _described(rank: int, mark: Mark) -> str:
    return f"rank {rank} (process {mark.pid} on {mark.host}, step {mark.step}, {mark.doing})"
