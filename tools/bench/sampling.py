"""Seconds a video: a checkpoint's sampling, denoising and decoding, by batch size.

python tools/bench/sampling.py outputs/quickstart/t2v [--steps 25 --batches 1 8]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from timing import machine, seconds, show

from opensora import runtime
from opensora.diffusion.schedule import FullSequenceConfig
from opensora.infer.pipeline import SamplingConfig, VideoPipeline


def main() -> None:
    """Measure each batch size and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = runtime.pick_device(options.device)
    pipeline = VideoPipeline.from_pretrained(options.checkpoint).to(device)
    sampling = SamplingConfig(schedule=FullSequenceConfig(num_steps=options.steps))
    took = {}
    for size in options.batches:
        prompts = ["a red circle moving right"] * size
        run = seconds(
            lambda prompts=prompts: pipeline(prompts, sampling=sampling),
            repeats=options.repeats,
            warmup=1,
        )
        took[str(size)] = run["median"] / size
    shape = vars(pipeline.shape)
    facts = {"steps": options.steps, "shape": shape, "seconds_a_video_by_batch": took}
    show({"benchmark": "sampling", "machine": machine(device), **facts})


if __name__ == "__main__":
    main()
