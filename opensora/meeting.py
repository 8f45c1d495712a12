"""How the ranks of a run find each other, and by which network interface.

The launcher announces who and where in the environment. Nothing here knows devices or models.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed

from opensora import interrupts
from opensora.errors import LostRank, UsageError
from opensora.peers import Peers, broke_a_connection


def announced(name: str, default: int) -> int:
    """A number that the launcher puts into the environment."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"the environment's {name} is '{text}'; it must be a number") from None


def join(device: torch.device, rank: int, world_size: int, timeout: timedelta) -> Peers:
    """Start the process group; the other ranks have the same while to come.

    A signal that comes while the others are waited for ends the process at once: the wait is not
    in Python, whose handlers would run only after it, and nothing is written yet.
    """
    interface = interface_of_others() if device.type == "cpu" else None
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    local = announced("LOCAL_WORLD_SIZE", 1)
    first = rank - announced("LOCAL_RANK", 0)
    try:
        with _deadly(signal.SIGTERM):
            interrupts.check()
            store = _meeting_place("ranks", timeout)
            mine = _meeting_place("peers", timeout)
            peers = Peers(rank, world_size, mine, range(first, first + local))
            peers.greet()  # first, so that who comes through below is known to all
            torch.distributed.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=timeout,
            )
            return peers
    except Exception as error:
        if not broke_a_connection(error):
            raise
        reason = " ".join(str(error).split())[:300]
        host, port = _address()
        raise LostRank(
            f"rank {rank} could not meet the other {world_size - 1} ranks at {host}:{port} "
            f"({reason}). Look whether all nodes were started with the same MASTER_ADDR and "
            "MASTER_PORT, and for a firewall between them; GLOO_SOCKET_IFNAME names the network "
            f"interface where several are (now: {os.environ.get('GLOO_SOCKET_IFNAME', 'unset')})"
        ) from error


@contextmanager
def _deadly(number: signal.Signals) -> Iterator[None]:
    """Inside the block a signal ends the process, whatever handler there is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, previous)


def interface_of_others() -> str | None:
    """The network interface by which this node reaches the first one, for gloo.

    gloo takes the interface that the host's own name leads to, which on many machines is the
    loopback, where no other node can reach it. None on a single node, where the environment has
    chosen already, or where it cannot be found (IPv6, systems other than Linux).
    """
    single = announced("WORLD_SIZE", 1) == announced("LOCAL_WORLD_SIZE", 1)
    if single or os.environ.get("GLOO_SOCKET_IFNAME") or sys.platform != "linux":
        return None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(_address())  # sends nothing: only the route is looked up
            here = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # an interface without an address
                    request = struct.pack("256s", name.encode())
                    found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                    if socket.inet_ntoa(found[20:24]) == here:
                        return name
    except OSError:
        return None
    return None


_SIOCGIFADDR = 0x8915
"""Linux's request for the IPv4 address of an interface (linux/sockios.h)."""


def _address() -> tuple[str, int]:
    """Host and port where the ranks meet."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), announced("MASTER_PORT", 29500)


def _meeting_place(purpose: str, timeout: timedelta) -> torch.distributed.Store:
    """The store where ranks find each other, kept apart from earlier attempts of the same job.

    After a restart by torchrun the agent's store still holds the dead ranks' addresses, and gloo
    ranks that read them fail to connect (seen in torch 2.13); a prefix per attempt hides them.
    """
    host, port = _address()
    agent_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    listens = purpose == "ranks" and announced("RANK", 0) == 0 and not agent_listens
    store = torch.distributed.TCPStore(
        host, port, announced("WORLD_SIZE", 1), is_master=listens, timeout=timeout,
        wait_for_workers=purpose == "ranks",
    )  # fmt: skip
    attempt = announced("TORCHELASTIC_RESTART_COUNT", 0)
    return torch.distributed.PrefixStore(f"opensora/{purpose}-{attempt}", store)
