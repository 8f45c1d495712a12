"""Decoded frames -> what a VAE takes, and back.

Frames are scaled until they cover the wanted size and the surplus is cropped, both in one step on
uint8, which is five to fifteen times faster than on float32. No colour is changed, and nothing is
mirrored unless asked for, because captions speak of left and right.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

CENTRE = (0.5, 0.5)


def crop_region(
    source: tuple[int, int], target: tuple[int, int], offset: tuple[float, float] | None
) -> tuple[int, int, int, int]:
    """The largest part of a frame that has the target's proportions, to the nearest pixel.

    Args:
        source: height and width of the frame.
        target: height and width wanted.
        offset: where the part lies along height and width, from 0 (top, left) to 1 (bottom,
            right); None takes the whole frame.

    Returns:
        top, left, height, width.
    """
    if offset is None:
        return 0, 0, *source
    scale = max(target[0] / source[0], target[1] / source[1])
    height = min(source[0], max(1, round(target[0] / scale)))
    width = min(source[1], max(1, round(target[1] / scale)))
    top = round((source[0] - height) * offset[0])
    left = round((source[1] - width) * offset[1])
    return top, left, height, width


def fit(
    frames: np.ndarray,
    size: tuple[int, int],
    *,
    offset: tuple[float, float] | None = CENTRE,
    flip: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Frames at another size, as floats.

    Resampling is bicubic with antialiasing. A frame that already has the size keeps its values.

    Args:
        frames: uint8 (F, H, W, 3).
        size: height and width wanted.
        offset: which part to keep where the proportions differ (see `crop_region`); None keeps
            everything and stretches it.
        flip: mirror left and right.
        out: float32 (3, F, *size) to write into, such as a place in a batch; new memory costs
            more than the conversion.

    Returns:
        float32 (3, F, *size) in [-1, 1].
    """
    top, left, height, width = crop_region((frames.shape[1], frames.shape[2]), size, offset)
    part = torch.from_numpy(frames)[:, top : top + height, left : left + width]
    pixels = part.permute(0, 3, 1, 2)  # (F, 3, H, W), channels last in memory: the fast path
    if (height, width) != tuple(size):
        pixels = interpolate(pixels, size, mode="bicubic", antialias=True)
    if flip:
        pixels = pixels.flip(3)
    target = torch.empty((3, frames.shape[0], *size)) if out is None else out
    return target.copy_(pixels.transpose(0, 1)).div_(127.5).sub_(1.0)


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Back to what a video writer takes; values outside [-1, 1] are clipped.

    Args:
        pixels: float (..., 3, F, H, W) in [-1, 1].

    Returns:
        uint8 (..., F, H, W, 3); exact for what `fit` made of uint8 without resampling.
    """
    scaled = pixels.detach().float().cpu().add(1.0).mul(127.5).round_().clamp_(0, 255)
    return scaled.to(torch.uint8).movedim(-4, -1).contiguous().numpy()
