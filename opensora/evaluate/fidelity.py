"""The suite `vae`: what a video keeps on its way through the VAE.

Every clip is encoded, decoded and rounded to 8 bits, as a viewer would see it, and compared with
itself frame by frame. No sampling and no text: the figures bound what any generator on these
latents can reach.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from opensora.config import Config
from opensora.data.transforms import fit, to_uint8
from opensora.errors import NumericsError, UsageError
from opensora.evaluate.clips import Clips, RealClipsConfig, open_clips
from opensora.evaluate.similarity import SSIM_WINDOW, flicker_added, psnr, ssim, unit
from opensora.evaluate.suite import (
    Autoencoder,
    Progress,
    Results,
    Row,
    Subject,
    Suite,
    shared,
    write,
)
from opensora.vae.causal import CausalVAE
from opensora.vae.perceptual import PerceptualDistance, load_perceptual


class LpipsConfig(Config):
    """Two weight files of LPIPS with VGG-16 (see `opensora.vae.perceptual`)."""

    vgg: str = Field(description="torchvision's vgg16 weights, .safetensors or .pth")
    heads: str = Field(description="the lpips package's v0.1/vgg weights, .safetensors or .pth")


class FidelityConfig(Config):
    """Which clips go through the VAE, and whether LPIPS is measured."""

    clips: RealClipsConfig = RealClipsConfig(num=64)
    lpips: LpipsConfig | None = Field(default=None, description="null leaves LPIPS out")


def run(subject: Subject, config: FidelityConfig, output: Path, progress: Progress) -> Results:
    """Judge a VAE; ranks share the clips.

    Returns:
        Group `vae`: psnr (dB, at most 100, mean over the frames), ssim, flicker_added (grey
        levels), and lpips where its weights are given; `curves` has the means of each frame.

    Raises:
        UsageError: a folder of videos was given, or clips that the VAE or SSIM cannot take.
        DataError: a clip cannot be read.
        NumericsError: the VAE has diverged.
    """
    judged = subject.autoencoder
    clips = open_clips(config.clips, judged.shape)
    _check(judged, clips)
    place = subject.place
    device = next(judged.vae.parameters()).device
    distance = None
    if config.lpips is not None:
        distance = load_perceptual(vgg=config.lpips.vgg, heads=config.lpips.heads).to(device)
    found = shared(
        place,
        len(clips),
        lambda index: _measure(judged, clips.read(index), distance),
        partial(progress, "vae"),
    )
    if not place.is_main:
        return {}
    rows = [Row("vae", name, values) for name, (values, _) in zip(clips.ids, found, strict=True)]
    curves = {
        name: np.mean([frames[name] for _, frames in found], axis=0).round(6).tolist()
        for name in found[0][1]
    }
    settings = {
        "suite": "vae",
        "weights": judged.fingerprint,
        "clips": clips.facts,
        "lpips": config.lpips is not None,
    }
    return write(output, rows, settings=settings, curves={"vae": curves})


@torch.no_grad()
def _measure(
    judged: Autoencoder, frames: np.ndarray, distance: PerceptualDistance | None
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The values of one clip, and of each of its frames."""
    first, second = (unit(torch.from_numpy(x)) for x in (reconstruct(judged.vae, frames), frames))
    curves = {"psnr": psnr(first, second), "ssim": ssim(first, second)}
    if distance is not None:
        device = next(judged.vae.parameters()).device
        pair = [(2 * x.float() - 1).to(device) for x in (first, second)]
        curves["lpips"] = distance(*pair).cpu().double()
    values = {name: float(curve.mean()) for name, curve in curves.items()}
    if len(frames) > 1:
        values["flicker_added"] = flicker_added(first, second)
    return values, {name: curve.tolist() for name, curve in curves.items()}


@torch.no_grad()
def reconstruct(vae: CausalVAE, frames: np.ndarray) -> np.ndarray:
    """uint8 (F, H, W, 3) encoded, decoded and rounded to the same.

    Raises:
        NumericsError: the VAE gives values that are no finite numbers, which 8 bits would hide.
    """
    device = next(vae.parameters()).device
    pixels = fit(frames, frames.shape[1:3])[None].to(device)
    decoded = vae.decode(vae.encode(pixels))
    broken = int((~decoded.isfinite()).sum())
    if broken:
        raise NumericsError(
            f"the VAE gives no finite number for {broken} of the {decoded.numel()} values of a "
            "clip: it has diverged, or its weights are damaged; judge an earlier checkpoint"
        )
    return to_uint8(decoded)[0]


def _check(judged: Autoencoder, clips: Clips) -> None:
    shape, stride = clips.shape, judged.vae.stride
    if (shape.num_frames - 1) % stride[0] or shape.height % stride[1] or shape.width % stride[2]:
        raise UsageError(
            f"clips of {shape.num_frames}x{shape.height}x{shape.width} do not fit the VAE: frames "
            f"are 1 + k*{stride[0]}, sides multiples of {stride[1]}x{stride[2]}; set clips.frames, "
            ".height, .width"
        )
    if min(shape.height, shape.width) < SSIM_WINDOW:
        raise UsageError(
            f"SSIM needs sides of {SSIM_WINDOW} pixels or more, the clips have "
            f"{shape.height}x{shape.width}: set clips.height and clips.width"
        )


SUITE = Suite(FidelityConfig, run, ("psnr", "ssim", "lpips", "flicker_added"))
