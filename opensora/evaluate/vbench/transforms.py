"""Frames as the feature networks of VBench see them, without torchvision.

Upstream resizes *float* tensors without antialiasing, so bicubic values overshoot 0..255 and stay
there; only appearance_style goes through PIL, which always antialiases and rounds. Both were read
in vbench/utils.py of Vchitect/VBench, the sizes of crops in torchvision's functional transforms.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

SIDE = 224

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def pixels_of(frames: np.ndarray) -> Tensor:
    """uint8 (F, H, W, 3) -> float32 (F, 3, H, W) in 0..255."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float()


def shorter_side(height: int, width: int, side: int) -> tuple[int, int]:
    """The size whose shorter side is `side`; the longer one is rounded down."""
    if height <= width:
        return side, int(side * width / height)
    return int(side * height / width), side


def resize(pixels: Tensor, side: int, mode: Literal["bilinear", "bicubic"]) -> Tensor:
    """Float (F, 3, H, W) with the shorter side at `side`: no antialiasing, nothing clipped."""
    size = shorter_side(pixels.shape[2], pixels.shape[3], side)
    if size == tuple(pixels.shape[2:]):
        return pixels
    return interpolate(pixels, size, mode=mode, align_corners=False, antialias=False)


def centre_crop(pixels: Tensor, side: int) -> Tensor:
    """The middle `side` x `side` of (F, 3, H, W) whose sides are at least that."""
    top = round((pixels.shape[2] - side) / 2)
    left = round((pixels.shape[3] - side) / 2)
    return pixels[:, :, top : top + side, left : left + side]


def for_dino(frames: np.ndarray, side: int = SIDE) -> Tensor:
    """Bilinear, shorter side 224, *not* cropped, ImageNet's mean and deviation.

    Args:
        frames: uint8 (F, H, W, 3).

    Returns:
        float32 (F, 3, h, w), min(h, w) = side.
    """
    pixels = resize(pixels_of(frames), side, "bilinear").div(255)
    return _standardised(pixels, _IMAGENET_MEAN, _IMAGENET_STD)


def for_clip(frames: np.ndarray, side: int = SIDE) -> Tensor:
    """Bicubic on floats, centre crop, CLIP's mean and deviation.

    Args:
        frames: uint8 (F, H, W, 3).

    Returns:
        float32 (F, 3, side, side).
    """
    pixels = centre_crop(resize(pixels_of(frames), side, "bicubic"), side).div(255)
    return _standardised(pixels, _CLIP_MEAN, _CLIP_STD)


def for_clip_as_pictures(frames: np.ndarray, side: int = SIDE) -> Tensor:
    """Like `for_clip`, resized as PIL does it: antialiased, on uint8, rounded and clipped.

    PIL's own result is met within one level of 255.
    """
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    size = shorter_side(pixels.shape[2], pixels.shape[3], side)
    if size != tuple(pixels.shape[2:]):
        pixels = interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True)
    pixels = centre_crop(pixels, side).float().div(255)
    return _standardised(pixels, _CLIP_MEAN, _CLIP_STD)


def _standardised(
    pixels: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
