"""What the benchmarks share: repeated timing, the machine's facts, and JSON on stdout."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch

from opensora import __version__, runtime


def seconds(work: Callable[[], object], *, repeats: int, warmup: int = 2) -> dict[str, float]:
    """Wall seconds of one call: the least, the median and the most of `repeats` calls."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeats):
        synchronise()
        began = time.perf_counter()
        work()
        synchronise()
        times.append(time.perf_counter() - began)
    return {"min": min(times), "median": statistics.median(times), "max": max(times)}


def paired(
    first: Callable[[], object], second: Callable[[], object], *, repeats: int
) -> tuple[dict[str, float], dict[str, float], float]:
    """Both timed in turn, and the median of the ratios second / first: drift cancels."""
    ratios, ones, others = [], [], []
    first(), second()
    for _ in range(repeats):
        one = seconds(first, repeats=1, warmup=0)["median"]
        other = seconds(second, repeats=1, warmup=0)["median"]
        ones.append(one)
        others.append(other)
        ratios.append(other / one)
    summary = [
        {"min": min(t), "median": statistics.median(t), "max": max(t)} for t in (ones, others)
    ]
    return summary[0], summary[1], statistics.median(ratios)


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure must be read with."""
    rates = {
        name: runtime.matmul_rate(device, dtype) / 1e9
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else runtime.processor_name()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "opensora": __version__,
        "torch": torch.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "matmul_gflops": {key: round(value, 1) for key, value in rates.items()},
    }


def show(result: dict[str, Any]) -> None:
    """Print a result as JSON."""
    print(json.dumps(result, indent=1))
