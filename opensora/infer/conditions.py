"""Frames that are there already: what a video begins or ends with, fills in between, or changes.

One thing says all of it: some latent frames start at a level below 1. At level 0 they are given and
stay; between 0 and 1 they are changed from that level on (SDEdit). Image to video, extension,
connection, looping, interpolation and editing differ only in which frames and which level.

Frames are coded for the place they go to: at the head of a video as a clip that begins there, and
later as the continuation of what came before them, which is how a causal VAE codes the clips that
models train on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opensora.data.transforms import fit
from opensora.digests import digest
from opensora.errors import DataError, UsageError
from opensora.media.picture import PICTURES, is_picture, read_picture
from opensora.media.read import read_clip
from opensora.media.source import check_file
from opensora.vae.causal import CausalVAE

_PAST_LATENTS = 3
"""Latent frames before given ones that are coded with them, so that they have a past."""


@dataclass(frozen=True)
class Given:
    """Frames, and where they go.

    Attributes:
        frames: uint8 (f, h, w, 3) of any size, at the rate of the video; one is a picture.
        at: the latent frame of the video where they go; negative counts from the end.
        start: the latent frame of their own that is taken first; negative counts from the end.
        count: how many latent frames; as many as there are and fit where it is None.
        level: 0 keeps them, 1 ignores them, between they are changed.
    """

    frames: np.ndarray
    at: int = 0
    start: int = 0
    count: int | None = None
    level: float = 0.0

    def __post_init__(self) -> None:
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or self.frames.dtype != np.uint8:
            raise UsageError(
                f"given frames are {self.frames.dtype} {self.frames.shape}; give uint8 (f, h, w, 3)"
            )
        if not 0.0 <= self.level <= 1.0:
            raise UsageError(f"the level of given frames is {self.level}; it lies in [0, 1]")
        if self.count is not None and self.count < 1:
            raise UsageError(f"{self.count} given frames; give at least 1")

    def slot(self, total: int, stride: int) -> slice:
        """The latent frames that these become, of a video of `total`.

        Raises:
            UsageError: they lie outside the video or their own frames.
        """
        at = self.at + total if self.at < 0 else self.at
        own = 1 + (len(self.frames) - 1) // stride
        start = self.start + own if self.start < 0 else self.start
        if not 0 <= at < total:
            raise UsageError(f"frames are given at {self.at} of a video of {total} latent frames")
        if not 0 <= start < own:
            wanted = f"the last {-self.start}" if self.start < 0 else f"those from {self.start} on"
            raise UsageError(
                f"{wanted} are given of {own} latent frames ({len(self.frames)} frames at the "
                "rate of the video to draw): give fewer, or a longer video"
            )
        count = min(total - at, own - start, self.count or total)
        return slice(at, at + count)

    def pixels(self, slot: slice, stride: int) -> np.ndarray:
        """The frames to code, of which the last `slot` latent frames are wanted.

        Frames that are missing at their front, as before a picture, are copies of the first.
        """
        count = slot.stop - slot.start
        needed = stride * count if slot.start else 1 + stride * (count - 1)
        if self.start < 0:
            end = len(self.frames) - stride * max(0, -self.start - count)
            begin = end - needed
        else:
            begin = 1 + stride * (self.start - 1) if self.start else 0
            end = min(begin + needed, len(self.frames))
            begin = end - needed
        if slot.start:
            begin -= 1 + stride * _PAST_LATENTS
        return self.frames[np.arange(begin, end).clip(min=0)]


@dataclass(frozen=True)
class Reference:
    """A file whose frames are given; the other attributes are those of `Given`.

    Attributes:
        window: of a long video, counted from 0, in which they are given.
    """

    path: str
    at: int = 0
    start: int = 0
    count: int | None = None
    level: float = 0.0
    window: int = 0

    @property
    def sha256(self) -> str:
        """Of the file: the first 16 digits.

        Raises:
            DataError: it cannot be read.
        """
        check_file(self.path)
        return digest(Path(self.path)).sha256[:16]

    def load(self, *, fps: float) -> Given:
        """Read the file: a picture, or a video at the rate of the one to draw.

        Raises:
            DataError: it cannot be read.
        """
        frames = read_frames(self.path, fps=fps)
        return Given(frames, self.at, self.start, self.count, self.level)


def check_reference(path: str | os.PathLike[str]) -> None:
    """Refuse what frames cannot be read of, as far as its name and the file system tell.

    Raises:
        DataError: it is no file, or a picture of another format.
    """
    if re.match(r"(https?|s3|gs|hf):/", str(path)):
        raise DataError(f"'{path}' is an address, and nothing is downloaded: give a file")
    check_file(path)
    if Path(path).suffix.lower() in (".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl"):
        raise DataError(f"'{path}' is a picture that is not read: give {', '.join(PICTURES)}")


def read_frames(path: str | os.PathLike[str], *, fps: float) -> np.ndarray:
    """uint8 (f, h, w, 3) of a picture or a video.

    Raises:
        DataError: it cannot be read.
    """
    check_reference(path)
    if is_picture(path):
        return read_picture(path)[None]
    return read_clip(path, fps=fps).frames


@dataclass(frozen=True)
class Beginning:
    """What latents start as.

    Attributes:
        latents: float32 (B, C, T, H, W); of frames that start at level 1 nothing is used.
        levels: float32 (B, T), the level that each starts at.
    """

    latents: Tensor
    levels: Tensor

    @property
    def given(self) -> Tensor:
        """bool (B, T): frames that stay as they are."""
        return self.levels == 0


@torch.no_grad()
def begin(
    vae: CausalVAE,
    given: Sequence[Sequence[Given]],
    latent_shape: tuple[int, int, int, int],
    device: torch.device,
) -> Beginning:
    """Code the given frames of each sample of a batch; later ones cover earlier ones.

    Args:
        latent_shape: (C, T, H, W) of a sample.

    Raises:
        UsageError: frames lie outside the video, or leave nothing to be made.
    """
    total, stride = latent_shape[1], vae.stride[0]
    size = (latent_shape[2] * vae.stride[1], latent_shape[3] * vae.stride[2])
    latents = torch.zeros(len(given), *latent_shape, device=device)
    levels = torch.ones(len(given), total)
    for sample, parts in enumerate(given):
        for part in parts:
            slot = part.slot(total, stride)
            pixels = fit(part.pixels(slot, stride), size).to(device)
            coded = vae.encode(pixels[None])[0]
            latents[sample, :, slot] = coded[:, -(slot.stop - slot.start) :]
            levels[sample, slot] = part.level
    if total and bool((levels == 0).all(dim=1).any()):
        raise UsageError("every frame of a video is given; leave at least one to be made")
    return Beginning(latents, levels)
