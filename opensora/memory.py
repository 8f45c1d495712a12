"""What memory is free, and which errors say that there is none left."""

from __future__ import annotations

import math
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception is an allocator's: CUDA's class, or the words of the CPU's (torch 2.13
    raises a RuntimeError there) and of the C++ library."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("DefaultCPUAllocator: can't allocate memory", "std::bad_alloc", "CUDA out of memory")
    return any(word in str(error) for word in words)


def free_bytes(device: torch.device) -> float:
    """Bytes that a process may still take; infinite where nothing is known of the device.

    Of a GPU, what torch's allocator holds and does not use counts as free. Of a Linux host it is
    what can be had without swapping, within the limit of the process's control group.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return math.inf
    return min(host_memory().get("MemAvailable", math.inf), _group_bytes())


def host_memory() -> dict[str, float]:
    """The bytes of /proc/meminfo by name; empty where it is not Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.partition(":") for line in lines)
    return {name: int(rest.split()[0]) * 1024.0 for name, _, rest in fields}


def _group_bytes() -> float:
    """What the control group leaves; its file cache is given back when asked for."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max": none
        taken = int((_CGROUP / "memory.current").read_text())
        parts = (line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cached = int(dict(parts).get("inactive_file", 0))
    except (OSError, ValueError):
        return math.inf
    return max(0, limit - taken + cached)
