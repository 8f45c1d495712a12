"""Bytes sent, seconds and memory of a step whose clip is shared by 2 and 4 ranks, as JSON.

    python tools/bench/sequence_parallel.py [--ranks 1 2 4 --width 128 --latent 16x32x32]

One clip, one pair of STDiT blocks. `dsp` trades frames for places; the others attend to all tokens
of the clip at once in the temporal block (a window of the whole picture) and share that. Memory is
the growth of the resident peak over a forward and a backward pass, at the given length and twice
it. On a CPU the ranks are gloo processes with one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from timing import machine, show

from opensora import runtime
from opensora.dist.groups import traffic
from opensora.dist.mesh import Layout, Mesh
from opensora.engine.sequence import SequenceParallel
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.types import Condition

CHANNELS, WORDS = 4, 32


def modes(ranks: int) -> dict[str, Layout]:
    """Layouts by name; what a number of ranks does not allow is left out."""
    if ranks == 1:
        return {"none": Layout(), "none, places": Layout()}
    found = {
        "dsp": Layout(ulysses=ranks),
        "ulysses": Layout(ulysses=ranks),
        "ring": Layout(ring=ranks),
    }
    if ranks % 2 == 0 and ranks > 2:
        found["usp"] = Layout(ulysses=ranks // 2, ring=2)
    return found


def measure(
    mode: str, mesh: Mesh | None, options: argparse.Namespace, frames: int
) -> dict[str, Any]:
    """One rank's figures of a mode at a length."""
    _, height, width = options.latent
    by_place = mode in ("dsp", "none, places")
    config = STDiTConfig(
        width=options.width,
        depth=1,
        num_heads=options.heads,
        text_channels=64,
        window=None if by_place else (height, width),
    )
    torch.manual_seed(0)
    model = STDiT(config, in_channels=CHANNELS)
    x = torch.randn(1, CHANNELS, frames, height, width)
    t = torch.rand(1, frames)
    cond = Condition(torch.randn(1, WORDS, 64), torch.ones(1, WORDS, dtype=torch.bool))
    parallel = SequenceParallel(mesh)
    times, sent = [], 0
    base = reset_peak()
    for _ in range(options.repeats + 1):
        began = time.perf_counter()
        with traffic() as ledger:
            parallel.run(model, x, t, cond, parallel.most).square().sum().backward()
        times.append(time.perf_counter() - began)
        sent = ledger.sent
        model.zero_grad(set_to_none=True)
    return {
        "tokens": frames * (height // 2) * (width // 2),
        "seconds": statistics.median(times[1:]),
        "megabytes_sent": sent / 1e6,
        "peak_megabytes": (peak() - base) / 1e6,
    }


def reset_peak() -> int:
    """Begin to watch the peak of resident memory anew; returns what is resident, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Bytes, of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def worker(
    rank: int, ranks: int, port: int, mode: str, frames: int, options: argparse.Namespace
) -> None:
    """What one rank does, in a process of its own so that no earlier mode's memory is counted."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    place = runtime.start("cpu")
    mesh = Mesh(modes(ranks)[mode], rank) if ranks > 1 else None
    result = measure(mode, mesh, options, frames)
    if place.is_main:
        Path(options.output).write_text(json.dumps(result))
    place.close()


def launch(ranks: int, mode: str, frames: int, options: argparse.Namespace) -> dict[str, Any]:
    """Rank 0's figures."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (ranks, port, mode, frames, options)
    torch.multiprocessing.spawn(worker, arguments, nprocs=ranks)
    return json.loads(Path(options.output).read_text())


def main() -> None:
    """Measure at every number of ranks and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--latent", default="16x32x32", help="frames x height x width")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    options.latent = tuple(int(n) for n in options.latent.split("x"))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        options.output = str(Path(folder) / "result.json")
        for ranks in options.ranks:
            results[str(ranks)] = {
                mode: [launch(ranks, mode, n * options.latent[0], options) for n in (1, 2)]
                for mode in modes(ranks)
            }
    facts = {"benchmark": "sequence_parallel", "machine": machine(torch.device("cpu"))}
    show({**facts, "width": options.width, "heads": options.heads, "ranks": results})


if __name__ == "__main__":
    main()
