"""What step caches spare and what they change: the trade-off of every cache and setting.

Each setting draws the same videos as no cache does and is timed in turn with it, so that drift of
the machine cancels. PSNR is of the frames, over all videos; FLOPs are those of the denoiser.

    python tools/bench/caching.py outputs/quickstart/t2v [--gate 30]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import machine, paired, show

from opensora import config as configs
from opensora import runtime
from opensora.engine.flops import FlopCounter
from opensora.errors import UsageError
from opensora.infer.pipeline import SamplingConfig, VideoPipeline

PROMPTS = [
    "a red circle moving right",
    "a blue square moving down",
    "a green triangle moving left slowly",
    "a yellow circle and a purple square",
]
EACH = ("spatial", "temporal", "cross", "joint", "mlp")
GRID: list[dict[str, Any]] = [
    *({"kind": "teacache", "threshold": x} for x in (0.05, 0.1, 0.2, 0.3)),
    *({"kind": "teacache", "threshold": x, "levels": [0, 1]} for x in (0.05, 0.1)),
    *({"kind": "first_block", "threshold": x} for x in (0.05, 0.1, 0.2)),
    {"kind": "pab"},
    {"kind": "pab", **{kind: {"every": 3} for kind in EACH}},
    {  # VideoSys's for Open-Sora
        "kind": "pab",
        "spatial": {"levels": [0.45, 0.93]},
        "temporal": {"every": 4, "levels": [0.45, 0.93]},
        "cross": {"every": 6, "levels": [0.45, 0.93]},
        "mlp": {"every": 1},
    },
]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Decibels between two sets of uint8 frames; infinite where they are equal."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


class Setting:
    """How the videos are drawn with one cache."""

    def __init__(self, pipeline: VideoPipeline, steps: int, guidance: float, cache: Any):
        tree = {"schedule": {"num_steps": steps}, "guidance": {"scale": guidance}, "cache": cache}
        self.pipeline, self.cache = pipeline, cache
        self.sampling = configs.validate(SamplingConfig, tree, where="bench")

    def frames(self) -> np.ndarray:
        """uint8 (videos, F, H, W, 3)."""
        drawn = self.pipeline(PROMPTS, sampling=self.sampling)
        return np.stack([sample.frames for sample in drawn])

    @torch.no_grad()
    def latents(self) -> torch.Tensor:
        """The denoiser's part alone."""
        shape = self.pipeline.shape
        size = (len(PROMPTS), *self.pipeline.latent_shape(shape))
        noise = torch.randn(size, generator=runtime.generator(0, "bench")).to(self.pipeline.device)
        return self.pipeline.draw_latents(noise, PROMPTS, shape, self.sampling)

    def flops(self) -> int:
        with FlopCounter() as counter:
            self.latents()
        return counter.total


def measure(plain: Setting, setting: Setting, exact: np.ndarray, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    *_, ratio = paired(setting.latents, plain.latents, repeats=repeats)
    return {
        "cache": setting.cache,
        "psnr": round(psnr(setting.frames(), exact), 2),
        "times_faster": round(ratio, 3),
        "times_fewer_flops": round(plain.flops() / setting.flops(), 3),
    }


def table(rows: list[dict[str, Any]], gate: float | None = None) -> str:
    """Rows below the gate are marked."""
    lines = [f"{'PSNR':>8} {'time':>7} {'FLOPs':>7}  cache"]
    for row in rows:
        told = " ".join(f"{key}={value}" for key, value in row["cache"].items())
        ratios = f"{row['times_faster']:>6.2f}x {row['times_fewer_flops']:>6.2f}x"
        below = "  BELOW THE GATE" if gate is not None and row["psnr"] < gate else ""
        lines.append(f"{row['psnr']:>8.2f} {ratios}  {told}{below}")
    return "\n".join(lines)


def main() -> None:
    """Measure the grid; the table goes to stderr, JSON to stdout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--gate", type=float, help="least PSNR; the fastest at it is picked")
    parser.add_argument("--only", nargs="+", help="kinds of caches")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = runtime.pick_device(options.device)
    pipeline = VideoPipeline.from_pretrained(options.checkpoint).to(device)
    plain = Setting(pipeline, options.steps, options.guidance, None)
    exact = plain.frames()
    rows = []
    for cache in GRID:
        if options.only and cache["kind"] not in options.only:
            continue
        setting = Setting(pipeline, options.steps, options.guidance, cache)
        rows.append(measure(plain, setting, exact, options.repeats))
        print(table(rows[-1:], options.gate).splitlines()[1], file=sys.stderr, flush=True)
    print(table(rows, options.gate), file=sys.stderr)
    facts: dict[str, Any] = {"steps": options.steps, "guidance": options.guidance, "rows": rows}
    if options.gate is not None:
        good = [row for row in rows if row["psnr"] >= options.gate]
        if not good:
            raise UsageError(f"no setting reaches {options.gate:g} dB: lower --gate")
        facts["picked"] = max(good, key=lambda row: row["times_faster"])
    show({"benchmark": "caching", "machine": machine(device), "videos": len(PROMPTS), **facts})


if __name__ == "__main__":
    main()
