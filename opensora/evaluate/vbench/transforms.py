"""Frames as the feature networks of VBench see them, without torchvision.

Upstream resizes *float* tensors without antialiasing, so bicubic values overshoot 0..255 and stay
there; appearance_style and the pictures of I2V go through PIL, which always antialiases and rounds,
and I2V's frames are antialiased floats. All were read in vbench/utils.py and
vbench2_beta_i2v/utils.py of Vchitect/VBench, the sizes of crops in torchvision's functional
transforms.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from opensora.media.picture import resize_picture

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


def resize(
    pixels: Tensor, side: int, mode: Literal["bilinear", "bicubic"], *, antialias: bool = False
) -> Tensor:
    """Float (F, 3, H, W) with the shorter side at `side`; nothing is clipped."""
    size = shorter_side(pixels.shape[2], pixels.shape[3], side)
    if size == tuple(pixels.shape[2:]):
        return pixels
    return interpolate(pixels, size, mode=mode, align_corners=False, antialias=antialias)


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
    """Like `for_clip`, resized by PIL: antialiased, on uint8, rounded and clipped."""
    return _standardised(_as_pictures(frames, side, side), _CLIP_MEAN, _CLIP_STD)


def for_likeness(frames: np.ndarray, side: int = SIDE) -> Tensor:
    """Frames of i2v_subject: bicubic, antialiased, shorter side 256, the middle 224 x 224 for DINO.

    Upstream leaves antialiasing to torchvision, which has it by default since 0.17.

    Args:
        frames: uint8 (F, H, W, 3).

    Returns:
        float32 (F, 3, side, side).
    """
    pixels = resize(pixels_of(frames), _around(side), "bicubic", antialias=True)
    return _standardised(centre_crop(pixels, side).div(255), _IMAGENET_MEAN, _IMAGENET_STD)


def picture_for_likeness(pictures: np.ndarray, side: int = SIDE) -> Tensor:
    """Like `for_likeness`, resized by PIL: the picture of i2v_subject."""
    pixels = _as_pictures(pictures, _around(side), side)
    return _standardised(pixels, _IMAGENET_MEAN, _IMAGENET_STD)


def _around(side: int) -> int:
    """The size from whose middle `side` is cut: 256 for 224."""
    return side * 8 // 7


def _as_pictures(frames: np.ndarray, shorter: int, side: int) -> Tensor:
    """uint8 (F, H, W, 3) -> float32 (F, 3, side, side) in 0..1, resized by PIL."""
    height, width = shorter_side(frames.shape[1], frames.shape[2], shorter)
    resized = np.stack([resize_picture(frame, height, width) for frame in frames])
    return centre_crop(pixels_of(resized), side).div(255)


def _standardised(
    pixels: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
