"""VAE frames a second: encode, decode, and a training step, at the quickstart's size or another.

python tools/bench/vae.py [--config configs/quickstart/vae.yaml --size 64 --frames 17 --batch 8]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from timing import machine, seconds, show

from opensora import config as configs
from opensora import runtime
from opensora.vae.causal import CausalVAE, CausalVAEConfig

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "vae.yaml"


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=QUICKSTART)
    parser.add_argument("--size", type=int, default=64, help="pixels down and across")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = runtime.pick_device(options.device)
    tree = configs.read(options.config)["task"]["vae"]
    vae = CausalVAE(configs.validate(CausalVAEConfig, tree, where=f"{options.config}"))
    vae.to(device)
    pixels = torch.rand(options.batch, 3, options.frames, options.size, options.size) * 2 - 1
    pixels = pixels.to(device)
    with torch.no_grad():
        latents = vae.encode(pixels)
        encode = seconds(lambda: vae.encode(pixels), repeats=options.repeats)
        decode = seconds(lambda: vae.decode(latents), repeats=options.repeats)

    def step() -> None:
        mean, _ = vae.posterior(pixels)
        (vae.reconstruct(mean) - pixels).abs().mean().backward()
        vae.zero_grad(set_to_none=True)

    train = seconds(step, repeats=options.repeats)
    frames = options.batch * options.frames
    rates = {"encode": encode, "decode": decode, "train": train}
    show(
        {
            "benchmark": "vae",
            "machine": machine(device),
            "parameters": sum(p.numel() for p in vae.parameters()),
            "clip": [options.batch, options.frames, options.size, options.size],
            "seconds": rates,
            "frames_per_second": {k: frames / v["median"] for k, v in rates.items()},
        }
    )


if __name__ == "__main__":
    main()
