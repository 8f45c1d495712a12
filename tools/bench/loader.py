"""Clips a second that reach training: decode, resize, collate, with and without workers.

    python tools/bench/loader.py [--manifest MANIFEST --workers 0 1 2]

Without a manifest it renders 200 scenes to a temporary folder.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from timing import machine, show

from opensora.arena.dataset import write_dataset
from opensora.arena.scenes import SceneConfig
from opensora.data import sources
from opensora.data.buckets import BucketsConfig
from opensora.runtime import Runtime

PLACE = Runtime(0, 1, 0, torch.device("cpu"))


def clips_per_second(manifest: Path, workers: int, batches: int) -> float:
    """The rate after the first batch, which starts the workers."""
    buckets = BucketsConfig.model_validate(
        {"resolutions": {"64px": {17: {"batch_size": 8}}}, "aspect_ratios": ["1:1"], "fps": 8}
    )
    config = sources.ClipsSourceConfig(manifest=manifest, buckets=buckets, num_workers=workers)
    needs = sources.Needs(stride=(4, 8, 8), patch=(1, 1, 1), latents=None)
    stream = sources.open_source(config, needs, seed=0).train(0)
    next(stream)
    began = time.perf_counter()
    count = sum(len(next(stream)) for _ in range(batches))
    rate = count / (time.perf_counter() - began)
    stream.close()
    return rate


def main() -> None:
    """Measure each number of workers and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--manifest", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest = options.manifest or write_dataset(folder, SceneConfig(), seed=0, count=200)
        rates = {
            str(n): clips_per_second(Path(manifest), n, options.batches) for n in options.workers
        }
    result = {"benchmark": "loader", "machine": machine(PLACE.device)}
    show({**result, "clips_per_second_by_workers": rates})


if __name__ == "__main__":
    main()
