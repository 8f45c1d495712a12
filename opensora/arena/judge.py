"""Reads a video back: which objects it shows, where they are, what colour and shape they have.

Works by inverting pictures (palette segmentation, components, templates, linking) with no learned
network, no prompt, and none of the painter's code; `score` then compares the reading with what a
prompt promised. It is strict on purpose: smears, ghosts, off-palette blobs and flashes are not
objects, and what is not an object is counted as a stranger.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from opensora.arena import segment
from opensora.arena.reading import COLOUR_NAMES, Reading, Track
from opensora.arena.segment import NOTHING, Patches
from opensora.arena.silhouette import overlaps
from opensora.errors import DataError

MIN_AREA = 40.0
"""Pixels (at 64 x 64) under which a patch is no object; the smallest real one has 200."""

MAX_SOFTNESS = 3.0
"""Widest edge of an object in pixels (at 64 x 64), from 20 to 80 % of its colour. Gaussian blur of
sigma s makes 1.7 s: a sharp edge has 0.6, blur 1.2 has 2.1, and blur 3 has 5."""

MIN_OPACITY = 0.8
"""Least amount of its colour that half of an object's pixels hold."""

_CONTRAST = 50.0  # RGB distance from the ground of whatever a person would see as a thing
_SKIRT = 3  # pixels (at 64) around a patch that hold the blurred part of its edge
_JUMP = 32.0  # pixels (at 64) that an object may move between two frames and stay the same
_RECOLOURED = 8.0  # pixels that a change of colour counts for when objects are linked
_MOST = 6  # objects a frame that are linked; a scene has at most three


@dataclass(frozen=True)
class _Finds:
    """All objects of all frames, one row a find."""

    frame: np.ndarray
    colour: np.ndarray
    centre: np.ndarray
    area: np.ndarray
    overlaps: np.ndarray
    whole: np.ndarray
    sides: np.ndarray

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, rows: np.ndarray) -> _Finds:
        return _Finds(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def read(frames: np.ndarray) -> Reading:
    """Find and follow the objects of a video.

    Args:
        frames: uint8 (F, H, W, 3) RGB, at least 16 x 16 pixels.

    Raises:
        DataError: for another dtype or shape.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise DataError(f"the judge reads uint8 (F, H, W, 3), found {frames.dtype} {frames.shape}")
    num_frames, height, width, _ = frames.shape
    if min(height, width) < 16:
        raise DataError(f"the judge needs at least 16 x 16 pixels, found {height} x {width}")
    unit = min(height, width) / 64
    pixels = segment.unmix(frames)
    labels = segment.opened(pixels.colour)
    patches = segment.patches(labels, min_area=MIN_AREA * unit * unit)
    bars, is_bar = _bars(patches, num_frames, height)
    finds, good = _examine(frames, patches, ~is_bar, bars, unit)
    known = np.append(good | is_bar, False)[patches.labels]  # the last entry is NOTHING's
    strangers = _strangers(pixels.contrast, known, unit)
    finds = _merged(finds, bars)
    return Reading(
        height=height,
        width=width,
        tracks=_tracks(finds, bars, unit),
        counts=np.bincount(finds.frame, minlength=num_frames),
        strangers=strangers,
        bars=bars,
    )


def _bars(patches: Patches, num_frames: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Left and right edge of the bar in each frame (-1 without), and which patches are bars."""
    tall = patches.box[:, 2] - patches.box[:, 0] >= 0.9 * height
    is_bar = (patches.colour == len(COLOUR_NAMES)) & tall
    edges = np.full((num_frames, 2), -1)
    edges[patches.frame[is_bar]] = patches.box[is_bar][:, [1, 3]]
    return edges, is_bar


def _examine(
    frames: np.ndarray, patches: Patches, candidate: np.ndarray, bars: np.ndarray, unit: float
) -> tuple[_Finds, np.ndarray]:
    """Measure the candidate patches; the finds among them, and which patches (P,) they are."""
    rows = np.flatnonzero(candidate & (patches.colour < len(COLOUR_NAMES)))
    good = np.zeros(len(candidate), bool)
    amount, solid, corner = _windows(frames, patches, rows, unit)
    area = amount.sum((1, 2))
    lines = np.arange(amount.shape[1]) + 0.5
    columns = np.arange(amount.shape[2]) + 0.5
    x = (amount.sum(1) * columns).sum(1) / np.maximum(area, 1e-9)
    y = (amount.sum(2) * lines).sum(1) / np.maximum(area, 1e-9)
    centre = np.stack([x, y], 1)
    soft = ((amount > 0.2) & (amount < 0.8)).sum((1, 2)) / (2 * np.sqrt(np.pi * area) + 1e-9)
    full = ((amount >= MIN_OPACITY) & solid).sum((1, 2)) >= 0.5 * solid.sum((1, 2))
    fine = full & (soft <= MAX_SOFTNESS * unit)
    frame, box = patches.frame[rows], patches.box[rows]
    near = 1 + unit
    cut = (bars[frame, 0] >= 0) & (box[:, 3] > bars[frame, 0] - near)
    cut &= box[:, 1] < bars[frame, 1] + near
    finds = _Finds(
        frame=frame,
        colour=patches.colour[rows],
        centre=centre + corner[:, ::-1],
        area=area,
        overlaps=overlaps(amount, centre, area),
        whole=~cut,
        sides=box[:, [1, 3]].astype(float),
    )
    good[rows[fine]] = True
    return finds[fine], good


def _windows(
    frames: np.ndarray, patches: Patches, rows: np.ndarray, unit: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Around each patch: how much of its colour each pixel holds (P, h, w), which pixels are the
    patch itself, and the y, x of the window's corner.

    Amounts run from 0 at a tenth to 1 at nine tenths of the colour, so that noise on the ground
    adds no area; the half-way line stays in place. Pixels nearer to another patch hold none.
    """
    skirt = max(1, round(_SKIRT * unit))
    box = patches.box[rows]
    corner = box[:, :2] - skirt - 1
    extent = (box[:, 2:] - box[:, :2]).max(0, initial=1) + 2 * (skirt + 1)
    y = corner[:, 0, None, None] + np.arange(extent[0])[:, None]
    x = corner[:, 1, None, None] + np.arange(extent[1])
    _, height, width = patches.labels.shape
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    where = (patches.frame[rows, None, None], y.clip(0, height - 1), x.clip(0, width - 1))
    label = patches.labels[where]
    solid = inside & (label == rows[:, None, None])
    mine, others = solid, inside & (label != NOTHING) & ~solid
    for _ in range(skirt):
        wider, against = segment.grown(mine), segment.grown(others)
        mine, others = mine | (wider & ~against), others | (against & ~mine)
    amount = segment.share(frames[where], patches.colour[rows])
    amount = np.clip((amount - 0.1) / 0.8, 0, 1)
    return np.where(mine & inside, amount, 0), solid, corner


def _strangers(contrast: np.ndarray, known: np.ndarray, unit: float) -> np.ndarray:
    """How many things in each frame stand out from the ground and are no known object: (F,)."""
    around = segment.grown(known, max(1, round(_SKIRT * unit)))
    visible = (contrast >= _CONTRAST) & ~around
    labels = segment.opened(np.where(visible, 0, NOTHING).astype(np.int8))
    found = segment.patches(labels, min_area=MIN_AREA * unit * unit)
    return np.bincount(found.frame, minlength=len(known))


def _merged(finds: _Finds, bars: np.ndarray) -> _Finds:
    """Finds with the two parts of an object that a bar cuts put together."""
    drop = np.zeros(len(finds), bool)
    centre, area, sides = finds.centre.copy(), finds.area.copy(), finds.sides.copy()
    for frame in np.flatnonzero(bars[:, 0] >= 0):
        cut = np.flatnonzero((finds.frame == frame) & ~finds.whole)
        for colour in set(finds.colour[cut].tolist()):
            parts = cut[finds.colour[cut] == colour]
            if len(parts) > 1:
                weight = area[parts] / area[parts].sum()
                centre[parts[0]] = weight @ centre[parts]
                area[parts[0]] = area[parts].sum()
                sides[parts[0]] = sides[parts, 0].min(), sides[parts, 1].max()
                drop[parts[1:]] = True
    return replace(finds, centre=centre, area=area, sides=sides)[~drop]


def _uncut(finds: _Finds, bars: np.ndarray) -> _Finds:
    """One object's finds, with x where the bar cuts it taken from the side that stays in sight."""
    if finds.whole.all() or not finds.whole.any():
        return finds
    arms = np.median((finds.sides - finds.centre[:, :1])[finds.whole], 0)
    from_sides = finds.sides - arms  # (n, 2): x by the left side, x by the right side
    bar = bars[finds.frame]
    left_shows = finds.sides[:, 0] < bar[:, 0]
    right_shows = finds.sides[:, 1] > bar[:, 1]
    weight = np.stack([left_shows, right_shows], 1).astype(float)
    known = ~finds.whole & (left_shows | right_shows)
    x = (from_sides * weight).sum(1) / np.maximum(weight.sum(1), 1)
    centre = finds.centre.copy()
    centre[known, 0] = x[known]
    return replace(finds, centre=centre)


def _tracks(finds: _Finds, bars: np.ndarray, unit: float) -> tuple[Track, ...]:
    """Finds linked through time, most prominent first."""
    num_frames = len(bars)
    chains: list[list[int]] = []
    for frame in range(num_frames):
        here = np.flatnonzero(finds.frame == frame)
        here = here[np.argsort(-finds.area[here], kind="stable")][:_MOST]
        alive = sorted(chains, key=lambda chain: finds.frame[chain[-1]], reverse=True)[:_MOST]
        cost = np.array([[_distance(finds, c, int(i), unit) for i in here] for c in alive])
        taken = set()
        for chain, find in assign(cost.reshape(len(alive), len(here)), limit=_JUMP * unit):
            alive[chain].append(int(here[find]))
            taken.add(find)
        chains += [[int(i)] for number, i in enumerate(here) if number not in taken]
    tracks = [_track(_uncut(finds[np.array(c)], bars), num_frames) for c in chains]
    return tuple(sorted(tracks, key=lambda track: -track.prominence))


def _distance(finds: _Finds, chain: list[int], find: int, unit: float) -> float:
    """How far a find is from where a chain is expected, in px; a new colour counts as distance."""
    last = chain[-1]
    expected = finds.centre[last]
    gap = finds.frame[find] - finds.frame[last]
    if gap > 1 and len(chain) > 1:
        before = chain[-2]
        pace = (expected - finds.centre[before]) / (finds.frame[last] - finds.frame[before])
        expected = expected + pace * gap
    changed = finds.colour[find] != finds.colour[last]
    return float(np.linalg.norm(finds.centre[find] - expected)) + _RECOLOURED * unit * changed


def assign(cost: np.ndarray, *, limit: float) -> list[tuple[int, int]]:
    """The pairs (row, column) of least total cost, exactly; a pair above `limit` is left apart.

    Args:
        cost: (n, m) with n, m <= 6: all orders are tried, at most 720.
    """
    rows, columns = cost.shape
    if not rows or not columns:
        return []
    size = max(rows, columns)
    padded = np.full((size, size), limit)
    padded[:rows, :columns] = np.minimum(cost, limit)
    orders = np.array(list(permutations(range(size))))
    best = orders[padded[np.arange(size), orders].sum(1).argmin()]
    pairs = [(r, int(c)) for r, c in enumerate(best[:rows]) if c < columns]
    return [(r, c) for r, c in pairs if cost[r, c] < limit]


def _track(finds: _Finds, num_frames: int) -> Track:
    def spread(values: np.ndarray, empty: float) -> np.ndarray:
        full = np.full((num_frames, *values.shape[1:]), empty, values.dtype)
        full[finds.frame] = values
        return full

    return Track(
        seen=spread(np.ones(len(finds), bool), False),
        whole=spread(finds.whole, False),
        positions=spread(finds.centre.astype(np.float64), np.nan),
        areas=spread(finds.area.astype(np.float64), np.nan),
        colours=spread(finds.colour.astype(int), -1),
        overlaps=spread(finds.overlaps.astype(np.float64), np.nan),
    )
