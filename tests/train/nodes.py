"""Two nodes on one machine: network namespaces with a cable between them (needs root)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESSES = ("10.77.31.1", "10.77.31.2")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why there can be no two nodes here, or nothing."""
    name = f"probe{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "delete", name)
    except FileNotFoundError:
        return "there is no `ip` (iproute2)"
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"
    return ""


@contextmanager
def two_nodes() -> Iterator[list[list[str]]]:
    """The words that run a command on each node."""
    names = [f"node{os.getpid()}-{i}" for i in range(2)]
    cable = [f"c{os.getpid()}{i}" for i in range(2)]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for name, end, address in zip(names, cable, ADDRESSES, strict=True):
            _ip("link", "set", end, "netns", name)
            for words in (["addr", "add", f"{address}/24", "dev", end], ["link", "set", end, "up"]):
                _ip("-n", name, *words)
            _ip("-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]
