"""Stand-ins that need no weights: how much moves, and how smoothly.

They are no VBench dimensions, are called `proxy.*`, and enter no total. They tell a still picture
from a video on a machine that has no weights at all.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch.nn.functional import interpolate, pad

from opensora.errors import DataError

SIDE, BLOCK, REACH = 128, 8, 8
"""Pictures are compared at a shorter side of 128, in blocks of 8, up to 8 pixels away."""


def motion(frames: np.ndarray) -> float:
    """How far the fastest blocks move from frame to frame, in pixels of a shorter side of 256.

    Block matching by mean absolute difference of grey pictures, whole pixels; the mean over pairs
    of the mean of the fastest 5 % of the blocks. Exactly 0 for a still picture; at most 22.6.

    Args:
        frames: uint8 (F, H, W, 3), F >= 2.

    Raises:
        DataError: a single frame does not move.
    """
    if len(frames) < 2:
        raise DataError("one frame does not move")
    grey = torch.from_numpy(frames).float().mean(-1)[:, None]  # (F, 1, H, W)
    height, width = grey.shape[2:]
    scale = SIDE / min(height, width)
    size = [max(BLOCK, round(side * scale / BLOCK) * BLOCK) for side in (height, width)]
    grey = interpolate(grey, size, mode="bilinear", align_corners=False, antialias=True)
    lengths = [_displacements(a, b) for a, b in itertools.pairwise(grey)]
    count = max(1, int(lengths[0].numel() * 0.05))
    means = [torch.topk(one.flatten(), count).values.mean() for one in lengths]
    return float(torch.stack(means).mean()) * 256 / SIDE


def _displacements(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Length of each block's best move; ties, as on plain ground, go to the shortest."""
    height, width = first.shape[1:]
    around = pad(second, (REACH, REACH, REACH, REACH), mode="replicate")
    best = torch.full((height // BLOCK, width // BLOCK), torch.inf)
    length = torch.zeros_like(best)
    offsets = [(y, x) for y in range(-REACH, REACH + 1) for x in range(-REACH, REACH + 1)]
    for y, x in sorted(offsets, key=lambda place: place[0] ** 2 + place[1] ** 2):
        moved = around[:, REACH + y : REACH + y + height, REACH + x : REACH + x + width]
        cost = torch.nn.functional.avg_pool2d((moved - first).abs()[None], BLOCK)[0, 0]
        better = cost < best - 0.5  # half a grey level: noise of a codec is not motion
        best = torch.where(better, cost, best)
        length[better] = float(np.hypot(y, x))
    return length


def smoothness(frames: np.ndarray) -> float:
    """1 - (mean absolute difference of odd frames from the mean of their neighbours) / 255.

    The form of VBench's motion_smoothness with an average where it has a learned interpolation.

    Args:
        frames: uint8 (F, H, W, 3), F >= 3.

    Raises:
        DataError: no frame lies between two others.
    """
    if len(frames) < 3:
        raise DataError("smoothness takes three frames")
    odd = range(1, len(frames) - 1, 2)
    errors = [
        np.abs((frames[i - 1].astype(float) + frames[i + 1]) / 2 - frames[i]).mean() for i in odd
    ]
    return (255.0 - float(np.mean(errors))) / 255.0
