"""Where this process runs, and randomness that is addressed instead of drawn.

Ranks, device and process group come from the launcher's environment. Every random number is a
function of (run seed, purpose, sample id, step ...), so a batch is the same on 1 or 64 ranks and
before or after a resume. Nothing here knows models or data.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from opensora import interrupts
from opensora.errors import OpensoraError, UsageError
from opensora.meeting import announced, join
from opensora.peers import Peers, ending_alike

log = logging.getLogger("opensora")


@dataclass(frozen=True)
class Runtime:
    """This process's place: `rank` of `world_size` ranks, on `device`.

    Attributes:
        peers: what the other ranks tell without a collective.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    peers: Peers = field(default_factory=Peers, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, values: Tensor, op: str = "sum") -> Tensor:
        """`values` reduced over the ranks with 'sum' or 'max'; unchanged on one rank.

        Args:
            values: any shape; moved through the device and returned where it was.
        """
        if self.world_size == 1:
            return values
        operation = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}
        moved = values.detach().to(self.device, copy=True)
        torch.distributed.all_reduce(moved, operation[op])
        return moved.to(values.device)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's small picklable value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Leave the process group; safe to call twice."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


ALONE = Runtime(0, 1, 0, torch.device("cpu"))
"""One process on the CPU."""


def pick_device(name: str = "auto") -> torch.device:
    """The torch device that `name` means; 'auto' takes CUDA, then MPS, then the CPU.

    Raises:
        UsageError: when the named device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"device '{name}' is not usable here ({reason}). Use auto or cpu."
        ) from None
    return device


def start(device: str = "auto", timeout_seconds: float = 600.0) -> Runtime:
    """Join the process group that torchrun announced, or stand alone without one.

    Uses NCCL on CUDA and gloo elsewhere. On the CPU the ranks of one machine share its cores
    unless OMP_NUM_THREADS says otherwise (torchrun sets it to 1), because oversubscribed threads
    cost 10x.

    Raises:
        UsageError: the device is not there, or the launcher's variables are not numbers.
    """
    rank, world_size, local_rank, local_world_size = (
        announced("RANK", 0),
        announced("WORLD_SIZE", 1),
        announced("LOCAL_RANK", 0),
        announced("LOCAL_WORLD_SIZE", 1),
    )
    chosen = pick_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
        torch.cuda.set_device(chosen)
    elif local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
    peers = Peers()
    if world_size > 1 and not torch.distributed.is_initialized():
        peers = join(chosen, rank, world_size, timedelta(seconds=timeout_seconds))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    return Runtime(rank, world_size, local_rank, chosen, peers)


@contextmanager
def taking_part(device: str = "auto") -> Iterator[Runtime]:
    """Inside the block this process has its place among the ranks (`start`); what ends one rank
    ends the others with its line and exit code.

    Raises:
        LostRank: another rank is gone.
    """
    place = start(device)
    try:
        with ending_alike(place.peers):
            yield place
    except OpensoraError:
        interrupts.ignore()  # torchrun stops the ranks that are left; all of them know why
        raise
    finally:
        place.close()


def address(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed that depends on every part of the address and on nothing else.

    BLAKE2b over the packed parts: stable across processes, platforms and Python versions, and
    without the correlations of arithmetic on seeds.
    """
    digest = hashlib.blake2b(purpose.encode(), digest_size=8)
    digest.update(struct.pack(f"<{1 + len(numbers)}q", seed, *numbers))
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator for one address. The CPU's stream is the same on every machine.

    The generator keeps the low 32 bits of its seed only (torch's mt19937), so one in four billion
    pairs of addresses shares a stream; what must not collide is hashed with `address` itself or
    with `fractions`.
    """
    return torch.Generator().manual_seed(address(seed, purpose, *numbers))


def noise(
    shape: Sequence[int], sample_ids: Sequence[int] | Tensor, seed: int, purpose: str, step: int = 0
) -> Tensor:
    """Standard normal noise, one addressed stream a sample.

    Args:
        shape: of one sample, without B.
        sample_ids: B ids; a sample's noise depends on its own id only, never on its neighbours.

    Returns:
        float32 (B, *shape) on the CPU.
    """
    rows = [
        torch.randn(tuple(shape), generator=generator(seed, purpose, int(i), step))
        for i in sample_ids
    ]
    return torch.stack(rows)


def uniform(
    sample_ids: Sequence[int] | Tensor, seed: int, purpose: str, step: int = 0, *, count: int = 1
) -> Tensor:
    """Uniform numbers in [0, 1), `count` for each sample id: float32 (B, count) on the CPU."""
    rows = [torch.rand(count, generator=generator(seed, purpose, int(i), step)) for i in sample_ids]
    return torch.stack(rows)


def fractions(ids: np.ndarray, seed: int, purpose: str, *numbers: int) -> np.ndarray:
    """One addressed number in [0, 1) for each id, for millions of ids at once.

    SplitMix64 (Steele, Lea, Flood 2014) of the id from an addressed starting point: a bijection of
    64-bit integers, so distinct ids get distinct hashes, of which the top 53 bits are kept.

    Args:
        ids: integers, any shape.

    Returns:
        float64 of the same shape.
    """
    key = np.uint64(address(seed, purpose, *numbers))
    state = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def matmul_rate(device: torch.device, dtype: torch.dtype, *, side: int | None = None) -> float:
    """FLOP/s of square matrix products here and now: the best of a few short trials.

    Args:
        side: of the matrices; by default large enough to fill the device.
    """
    side = side or (8192 if device.type == "cuda" else 1024)
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    best = 0.0
    for _ in range(6):
        began = time.perf_counter()
        product = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
        del product
    return best


def processor_name() -> str:
    """The processor's marketing name, or its architecture where none is told."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
