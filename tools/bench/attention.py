"""Seconds and TFLOP/s of every attention backend that runs here, by length and head dim, as JSON.

    python tools/bench/attention.py [--lengths 4096 16384 65536 --head-dims 64 72 128 --heads 16]

One sequence; forward alone, and forward with backward. FLOPs are those of the products that the
mask leaves, 4 L S d a head forward and 2.5 times as many backward. Backends are timed in turn, so
that a busy machine is unfair to none; what a backend refuses, or what would take too much memory,
is told instead of a time. Defaults are small on a CPU. Not yet run on CUDA.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from timing import machine, seconds, show
from torch import Tensor

from opensora import runtime
from opensora.ops import backends
from opensora.ops.attention import attend
from opensora.ops.backends import BACKENDS, Request
from opensora.ops.patterns import Frames, Packed, Pattern, kind_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOGITS = 4 * 2**30
"""Bytes that plain arithmetic may take for one copy of the logits; it holds about four."""


def pattern(name: str, length: int) -> tuple[Pattern, float]:
    """The mask, and the share of the products of L x L that it leaves."""
    if name == "frames":
        return Frames(length // 16), (16 + 1) / (2 * 16)
    if name == "packed":
        return Packed((length // 4,) * 4), 1 / 4
    return None, 1.0


def works(q: Tensor, mask: Pattern) -> dict[str, Callable[[], object]]:
    """What is timed: the forward pass, and both."""

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(q, q, q, mask=mask)

    def both() -> Any:
        out = attend(q, q, q, mask=mask)
        return torch.autograd.grad(out.sum(), q)

    return {"forward": forward, "both": both}


def obstacle(name: str, q: Tensor, mask: Pattern) -> str | None:
    """Why a backend is not timed at a shape, or None."""
    backend = BACKENDS[name]
    request = Request(q.dtype, q.shape[-1], kind_of(mask))
    reason = backend.lacking(backends.machine(q.device)) or backend.refuses(request)
    if reason is None and name == "plain" and 4 * q.shape[2] * q.shape[1] ** 2 > LOGITS:
        reason = "its logits would take too much memory"
    return reason


def measure(options: argparse.Namespace, length: int, head_dim: int) -> dict[str, Any]:
    """A row: by backend its milliseconds and TFLOP/s, or why there are none."""
    device, dtype = options.device, DTYPES[options.dtype]
    mask, share = pattern(options.mask, length - length % 16)
    shape = (1, length - length % 16, options.heads, head_dim)
    q = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    row: dict[str, Any] = {name: obstacle(name, q, mask) for name in BACKENDS}
    times = {name: {"forward": [], "both": []} for name, reason in row.items() if reason is None}
    for turn in range(options.repeats + 1):
        for name, found in times.items():
            with backends.preferring(name):
                for way, work in works(q, mask).items():
                    found[way].append(seconds(work, repeats=1, warmup=int(turn == 0))["median"])
    flops = 4 * shape[1] ** 2 * head_dim * options.heads * share
    for name, found in times.items():
        medians = {way: statistics.median(taken[1:]) for way, taken in found.items()}
        row[name] = {
            "forward_ms": round(1e3 * medians["forward"], 3),
            "forward_tflops": round(flops / medians["forward"] / 1e12, 4),
            "both_ms": round(1e3 * medians["both"], 3),
            "both_tflops": round(3.5 * flops / medians["both"] / 1e12, 4),
        }
    return {"length": shape[1], "head_dim": head_dim, **row}


def main() -> None:
    """Measure every length and head dim and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 72, 128])
    parser.add_argument("--heads", type=int)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--mask", choices=["none", "frames", "packed"], default="none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", type=runtime.pick_device, default="auto")
    options = parser.parse_args()
    on_gpu = options.device.type == "cuda"
    options.lengths = options.lengths or ([4096, 16384, 65536] if on_gpu else [256, 1024])
    options.heads = options.heads or (16 if on_gpu else 4)
    options.dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    rows = [measure(options, n, d) for n in options.lengths for d in options.head_dims]
    facts = {"benchmark": "attention", "machine": machine(options.device)}
    settings = {name: getattr(options, name) for name in ("heads", "dtype", "mask", "repeats")}
    show({**facts, **settings, "rows": rows})


if __name__ == "__main__":
    main()
