"""From pixels to patches of one palette colour: the eyes of the judge.

Each pixel is read as a mixture of the ground with the nearest palette colour; half and more of a
colour makes it part of that colour. Patches are 4-connected, after an opening with a 3 x 3 square,
and are found in all frames at once. Knows the palette, and nothing of how scenes are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opensora.arena.palette import BAR, COLOURS, GROUND

NAMES: tuple[str, ...] = (*COLOURS, "bar")
NOTHING = -1

REJECTION = 55.0
"""RGB distance from a mixture beyond which a pixel has no palette colour (half of the smallest
distance between two palette colours is 51)."""

_TABLE = np.array([*COLOURS.values(), BAR], np.float32)
_GROUND = np.array(GROUND, np.float32)
_PIXELS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Pixels:
    """What each pixel of F frames shows, arrays (F, H, W).

    Attributes:
        colour: int8, index into `NAMES` of the nearest colour where it covers half and more of the
            pixel and explains it, else `NOTHING`.
        contrast: float32, RGB distance from the ground.
    """

    colour: np.ndarray
    contrast: np.ndarray


@dataclass(frozen=True)
class Patches:
    """Connected patches: `labels` int32 (F, H, W) holds the patch of each pixel or `NOTHING`, the
    rest has one entry a patch, in order of frames.

    Attributes:
        frame, colour, area: int (P,).
        box: int (P, 4), top, left, bottom, right; bottom and right are outside.
    """

    labels: np.ndarray
    frame: np.ndarray
    colour: np.ndarray
    area: np.ndarray
    box: np.ndarray


def unmix(frames: np.ndarray) -> Pixels:
    """What the pixels of uint8 (F, H, W, 3) frames show."""
    step = max(1, _PIXELS_AT_ONCE // (frames.shape[1] * frames.shape[2]))
    parts = [_unmix(frames[i : i + step]) for i in range(0, len(frames), step)]
    return Pixels(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _unmix(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    offset = frames.reshape(-1, 3).astype(np.float32) - _GROUND  # (N, 3)
    square = np.einsum("nc,nc->n", offset, offset)
    colour = np.full(len(offset), NOTHING, np.int8)
    ways = _TABLE - _GROUND  # (K, 3)
    lengths = (ways * ways).sum(1)
    # Most pixels are ground; only what may hold half of a colour is compared with every colour.
    rows = np.flatnonzero(square >= lengths.min() / 4)
    along = offset[rows] @ ways.T  # (n, K)
    amount = np.clip(along / lengths, 0, 1)
    misfit = amount * (amount * lengths - 2 * along)  # squared distance less |offset|^2
    nearest = misfit.argmin(1)
    every = np.arange(len(rows))
    explained = square[rows] + misfit[every, nearest] <= REJECTION**2
    holds = explained & (amount[every, nearest] >= 0.5)
    colour[rows] = np.where(holds, nearest, NOTHING)
    shape = frames.shape[:3]
    return colour.reshape(shape), np.sqrt(square).reshape(shape)


def share(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """How much of one colour pixels hold, whatever else is in them: float32 (P, ...) in [0, 1].

    The projection on the way from the ground to the colour. It ignores the errors across that way
    which codecs with coarse chroma leave at edges.

    Args:
        pixels: (P, ..., 3) RGB.
        colour: (P,) index into `NAMES`.
    """
    ways = (_TABLE - _GROUND)[colour]
    ways = ways / (ways * ways).sum(1, keepdims=True)
    along = np.einsum("p...c,pc->p...", pixels, ways) - (_GROUND * ways).sum(1).reshape(
        -1, *([1] * (pixels.ndim - 2))
    )
    return np.clip(along, 0, 1)


def opened(labels: np.ndarray) -> np.ndarray:
    """`labels` (F, H, W) without what a 3 x 3 square of one label cannot cover."""
    core = labels != NOTHING
    inner = np.zeros_like(core)
    centre = labels[:, 1:-1, 1:-1]
    same = core[:, 1:-1, 1:-1].copy()
    height, width = labels.shape[1:]
    for y in range(3):
        for x in range(3):
            same &= labels[:, y : y + height - 2, x : x + width - 2] == centre
    inner[:, 1:-1, 1:-1] = same
    return np.where(grown(inner), labels, NOTHING)


def grown(mask: np.ndarray, by: int = 1) -> np.ndarray:
    """A boolean (..., H, W) mask widened by `by` pixels in all eight directions."""
    for _ in range(by):
        wide = mask.copy()
        wide[..., 1:] |= mask[..., :-1]
        wide[..., :-1] |= mask[..., 1:]
        mask = wide.copy()
        mask[..., 1:, :] |= wide[..., :-1, :]
        mask[..., :-1, :] |= wide[..., 1:, :]
    return mask


def patches(labels: np.ndarray, *, min_area: float) -> Patches:
    """The connected patches of equal label in (F, H, W), without those under `min_area` pixels.

    Works on horizontal runs: equal runs that overlap in neighbouring rows are joined.
    """
    _, height, width = labels.shape
    flat = labels.reshape(-1)
    edge = np.ones(len(flat) + 1, bool)
    edge[1:-1] = flat[1:] != flat[:-1]
    edge[np.arange(0, len(flat), width)] = True
    bounds = np.flatnonzero(edge)
    starts, ends = bounds[:-1], bounds[1:]
    solid = flat[starts] != NOTHING
    starts, ends = starts[solid], ends[solid]
    groups = _join(starts, ends, flat, (height, width))
    count = int(groups.max()) + 1 if len(groups) else 0
    area = np.bincount(groups, weights=ends - starts, minlength=count).astype(int)
    kept = np.cumsum(area >= min_area) - 1
    kept[area < min_area] = NOTHING
    painted = np.full(len(flat), NOTHING, np.int32)
    group_of_pixel = np.repeat(kept[groups], ends - starts)
    painted[_spans(starts, ends)] = group_of_pixel
    return _describe(painted.reshape(labels.shape), labels, starts, ends, kept[groups])


def _join(
    starts: np.ndarray, ends: np.ndarray, flat: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """The group of each run: (R,) from 0, in order of first appearance."""
    height, width = size
    low = np.searchsorted(ends, starts + width, side="right")
    high = np.searchsorted(starts, ends + width, side="left")
    last_row = (starts // width) % height == height - 1
    number = np.where(last_row, 0, np.maximum(high - low, 0))
    upper = np.repeat(np.arange(len(starts)), number)
    lower = _spans(low, low + number)
    alike = flat[starts[upper]] == flat[starts[lower]]
    upper, lower = upper[alike], lower[alike]
    group = np.arange(len(starts))
    while True:
        least = np.minimum(group[upper], group[lower])
        after = group.copy()
        np.minimum.at(after, upper, least)
        np.minimum.at(after, lower, least)
        after = after[after]
        if (after == group).all():
            return np.unique(group, return_inverse=True)[1]
        group = after


def _spans(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The integers of all half-open spans, one after the other."""
    lengths = ends - starts
    offsets = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.arange(int(lengths.sum())) - offsets + np.repeat(starts, lengths)


def _describe(
    painted: np.ndarray, labels: np.ndarray, starts: np.ndarray, ends: np.ndarray, run: np.ndarray
) -> Patches:
    """The table of patches from the runs that make them."""
    _, height, width = labels.shape
    real = run != NOTHING
    starts, ends, run = starts[real], ends[real], run[real]
    count = int(run.max()) + 1 if len(run) else 0
    row, left = (starts // width) % height, starts % width
    box = np.empty((count, 4), int)
    box[:, :2] = max(height, width)
    box[:, 2:] = 0
    np.minimum.at(box[:, 0], run, row)
    np.minimum.at(box[:, 1], run, left)
    np.maximum.at(box[:, 2], run, row + 1)
    np.maximum.at(box[:, 3], run, left + ends - starts)
    frame, colour = np.zeros(count, int), np.zeros(count, int)
    frame[run] = starts // (width * height)
    colour[run] = labels.reshape(-1)[starts]
    area = np.bincount(run, weights=ends - starts, minlength=count).astype(int)
    return Patches(painted, frame, colour, area, box)
