"""The arithmetic of the dimensions: features, frames or flows of one video -> its score.

No network and no file is touched here. Each function was read in the file of the same name in
vbench/ of Vchitect/VBench (45e79ec); where one process and several disagree there, the rule of one
process is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from opensora.errors import DataError

RAFT_UPDATES = 20


@dataclass(frozen=True)
class Measured:
    """What one video has in one dimension.

    Attributes:
        value: its own score; of dynamic_degree 0 or 1.
        weight: of the video in the mean over videos: frames where upstream averages frames.
    """

    value: float
    weight: float = 1.0


def mean(measured: Sequence[Measured]) -> float:
    """The score of a dimension: the weighted mean over its videos."""
    weights = np.array([one.weight for one in measured], float)
    values = np.array([one.value for one in measured], float)
    return float((weights * values).sum() / weights.sum())


def consistency(features: Tensor) -> Measured:
    """subject_consistency (features of DINO) and background_consistency (of CLIP).

    Each frame but the first scores the mean of its similarity to the frame before it and to the
    first one, negative cosines as 0. Videos weigh by their frames but one.

    Args:
        features: float (F, D), F >= 2.

    Raises:
        DataError: a single frame has nothing to be consistent with.
    """
    _needs_two(len(features))
    unit = normalize(features.double(), dim=-1)
    before = cosine_similarity(unit[:-1], unit[1:], dim=-1).clamp_min(0)
    first = cosine_similarity(unit[:1], unit[1:], dim=-1).clamp_min(0)
    scores = (before + first) / 2
    return Measured(float(scores.mean()), len(scores))


def likeness(picture: Tensor, features: Tensor) -> Measured:
    """i2v_subject: how like its picture a video is somewhere, and how alike its frames are.

    0.4 (highest similarity of a frame to the picture) + 0.3 (mean similarity of neighbours)
    + 0.3 (lowest similarity of neighbours); negative cosines count as 0. Read in
    vbench2_beta_i2v/i2v_subject.py. Every video weighs the same.

    Args:
        picture: float (D,), DINO's features of the picture.
        features: float (F, D) of the frames, F >= 2.

    Raises:
        DataError: a single frame has no neighbour.
    """
    _needs_two(len(features))
    unit = normalize(features.double(), dim=-1)
    to_picture = cosine_similarity(picture.double()[None], unit, dim=-1).clamp_min(0)
    before = cosine_similarity(unit[:-1], unit[1:], dim=-1).clamp_min(0)
    return Measured(float(0.4 * to_picture.max() + 0.3 * before.mean() + 0.3 * before.min()))


def flickering(frames: np.ndarray) -> Measured:
    """temporal_flickering: 1 - (mean absolute difference of neighbouring frames) / 255.

    Args:
        frames: uint8 (F, H, W, 3), F >= 2; the order of the channels does not matter.
    """
    _needs_two(len(frames))
    differences = [
        np.abs(a.astype(np.int16) - b.astype(np.int16)).mean()
        for a, b in itertools.pairwise(frames)
    ]
    return Measured((255.0 - float(np.mean(differences))) / 255.0)


def aesthetic(features: Tensor, weight: Tensor, bias: Tensor) -> Measured:
    """aesthetic_quality: LAION's linear head on unit features of CLIP L/14, mean over frames, / 10.

    Args:
        features: float (F, 768).
        weight: (1, 768); bias: (1,).
    """
    scores = normalize(features.float(), dim=-1) @ weight.T + bias
    return Measured(float((scores.squeeze(-1) / 10).mean()))


def style(image_features: Tensor, text_features: Tensor, logit_scale: float) -> Measured:
    """appearance_style: CLIP's logit of each frame and the style's words, / 100.

    Args:
        image_features: float (F, D); text_features: float (D,).
        logit_scale: what cosines are multiplied with, near 100 in trained weights.
    """
    images, text = normalize(image_features, dim=-1), normalize(text_features, dim=-1)
    logits = images @ text * logit_scale
    return Measured(float((logits / 100).double().mean()), len(logits))


def top_magnitude(flow: Tensor, share: float) -> float:
    """Mean length of the longest `share` of the flow vectors, in pixels.

    Args:
        flow: float (2, H, W), padding included, as upstream takes it.
    """
    lengths = flow.square().sum(0).sqrt().flatten()
    count = max(1, int(len(lengths) * share))
    return float(torch.topk(lengths, count).values.mean())


def kept_frames(num_frames: int, fps: float) -> range:
    """The frames that dynamic_degree looks at: every round(fps / 8)-th."""
    return range(0, num_frames, max(1, round(fps / 8)))


def is_dynamic(magnitudes: Sequence[float], num_frames: int, size: tuple[int, int]) -> bool:
    """Whether enough pairs of kept frames move.

    Args:
        magnitudes: of the top 5 % of the flow of each pair of neighbours, in pixels.
        num_frames: kept frames.
        size: height and width of the frames without padding.
    """
    threshold = 6.0 * (min(size) / 256.0)
    moving = sum(magnitude > threshold for magnitude in magnitudes)
    # Of one or two frames upstream asks for no moving pair, and any pair at all will do.
    return bool(magnitudes) and moving >= round(4 * (num_frames / 16.0))


def is_static(magnitudes: Sequence[float], num_frames: int, size: tuple[int, int]) -> bool:
    """Whether a video passes the static filter before temporal_flickering.

    Args:
        magnitudes: of the top 2 % of the flow of each pair of neighbours, then of first to last
            and of last to first, in pixels.
    """
    threshold = 3.0 * (min(size) / 256.0)
    allowed = round(2 * (num_frames / 16.0))
    moving = sum(magnitude > threshold for magnitude in magnitudes[:-2])
    far = any(magnitude > threshold * allowed * 2 for magnitude in magnitudes[-2:])
    return moving <= allowed and not far


def _needs_two(num_frames: int) -> None:
    if num_frames < 2:
        raise DataError("one frame is no video: this dimension compares frames")
