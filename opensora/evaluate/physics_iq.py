"""Physics-IQ's measures of whether motion happens where, when, and how much it should.

Motamed et al. 2025, "Do generative video models understand physical principles?". The maths follows
google-deepmind/physics-IQ-benchmark (`binary_mask_generator.py`,
`calculate_and_write_metrics_to_csv.py`, `calculate_iq_score.py`) in float arithmetic with the same
roundings, without OpenCV; masks are not sent through a lossy video on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, max_pool2d, pad

from opensora.errors import DataError

THRESHOLD = 10
MEMORY = 0.3
"""Weight of the newest frame in the running average that motion is measured against."""

SHRINK = 4
"""Masks and frames are compared at a quarter of their height and width."""

METRICS = ("spatial_iou", "spatiotemporal_iou", "weighted_spatial_iou", "mse")
Measures = dict[str, float]


def motion_masks(frames: np.ndarray) -> np.ndarray:
    """Where something moves: bool (F, H, W) of uint8 (F, H, W, 3).

    Grey, blurred 5 x 5, against a running average of the frames so far; differences above 10 of
    255, opened and closed with a 5 x 5 square. The first frame has no motion.
    """
    grey = _blurred(_grey(frames))
    average = grey[0].clone()
    moving = torch.zeros(grey.shape, dtype=torch.bool)
    for number in range(1, len(grey)):
        average = (1 - MEMORY) * average + MEMORY * grey[number]
        moving[number] = (grey[number] - average.round()).abs() > THRESHOLD
    x = moving[:, None].float()  # F 1 H W
    x = _dilate(_erode(x))
    x = _erode(_dilate(x))
    return (x[:, 0] > 0.5).numpy()


def measure(first: np.ndarray, second: np.ndarray) -> Measures:
    """The four measures of two videos of one shape, the real one first or not: all are symmetric.

    spatial_iou: of the places where anything ever moves. spatiotemporal_iou: of the masks, mean
    over the frames. weighted_spatial_iou: sum of minima over sum of maxima of how often each place
    moves. Empty against empty is 1. mse: of pixels in [0, 1].

    Args:
        first, second: uint8 (F, H, W, 3), sides of 4 pixels or more.

    Raises:
        DataError: their shapes differ, or they are too small.
    """
    if first.shape != second.shape:
        raise DataError(
            f"videos of {_shape(first)} and {_shape(second)} cannot be compared: make them one size"
        )
    if min(first.shape[1:3]) < SHRINK:
        raise DataError(f"videos of {_shape(first)} are too small: {SHRINK} pixels a side at least")
    a, b = (
        _quarter(motion_masks(video)[..., None] * np.uint8(255)) > 127 for video in (first, second)
    )
    x, y = (_quarter(video) / 255 for video in (first, second))
    a, b = a[:, 0], b[:, 0]
    often_a, often_b = a.double().mean(0), b.double().mean(0)
    most = torch.maximum(often_a, often_b).sum()
    weighted = torch.minimum(often_a, often_b).sum() / most if most > 0 else torch.ones(())
    return {
        "spatial_iou": _iou(a.any(0), b.any(0)),
        "spatiotemporal_iou": float(np.mean([_iou(p, q) for p, q in zip(a, b, strict=True)])),
        "weighted_spatial_iou": float(weighted),
        "mse": float((x - y).square().mean()),
    }


def score(generated: Sequence[Mapping[str, float]], real: Sequence[Mapping[str, float]]) -> float:
    """The Physics-IQ score in [0, 100].

    100 x (mean of the three IoUs, each divided by what two takes of reality reach, minus the MSE
    that exceeds theirs), from the means over all scenes, then clipped. Upstream rounds those means
    to 4 decimals; here they are not rounded.

    Args:
        generated: measures of generated against real, one a scene.
        real: measures of one take against another.

    Raises:
        DataError: the takes have no motion in common, so nothing can be divided by it.
    """
    mine = {name: float(np.mean([row[name] for row in generated])) for name in METRICS}
    best = {name: float(np.mean([row[name] for row in real])) for name in METRICS}
    if min(best[name] for name in METRICS[:3]) <= 0:
        raise DataError("the two takes have no motion in common: their IoU is 0 and cannot divide")
    ratio = np.mean([mine[name] / best[name] for name in METRICS[:3]])
    return float(100 * np.clip(ratio - (mine["mse"] - best["mse"]), 0, 1))


def _grey(frames: np.ndarray) -> Tensor:
    """float64 (F, H, W) of whole numbers: ITU-R BT.601 luma, rounded as 8-bit pictures are."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    return (torch.from_numpy(frames).double() @ weights + 0.5).floor()


def _blurred(grey: Tensor) -> Tensor:
    """Binomial 1 4 6 4 1, OpenCV's Gaussian of five for a sigma of 0; edges are mirrored."""
    weights = torch.tensor([1, 4, 6, 4, 1], dtype=torch.float64) / 16
    x = pad(grey[:, None], (2, 2, 2, 2), mode="reflect")
    x = conv2d(conv2d(x, weights.view(1, 1, 5, 1)), weights.view(1, 1, 1, 5))
    return (x[:, 0] + 0.5).floor()


def _dilate(x: Tensor) -> Tensor:
    return max_pool2d(x, 5, stride=1, padding=2)


def _erode(x: Tensor) -> Tensor:
    return -max_pool2d(-x, 5, stride=1, padding=2)


def _quarter(frames: np.ndarray) -> Tensor:
    """uint8 (F, H, W, C) -> float64 (F, C, H // 4, W // 4), bilinear and rounded, as 8 bits are."""
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).double()
    size = (x.shape[2] // SHRINK, x.shape[3] // SHRINK)
    return (interpolate(x, size, mode="bilinear", align_corners=False) + 0.5).floor()


def _iou(a: Tensor, b: Tensor) -> float:
    union = (a | b).sum().item()
    return (a & b).sum().item() / union if union else 1.0


def _shape(video: np.ndarray) -> str:
    return "x".join(map(str, video.shape[:3]))
