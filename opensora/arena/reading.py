"""What the judge read from a video: the objects it could follow, and how much else there was.

Plain data; made by `judge.read`, questioned by `trajectory` and `score`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opensora.arena.grammar import SHAPES
from opensora.arena.palette import COLOURS

COLOUR_NAMES = tuple(COLOURS)

MIN_PRESENCE = 0.5
"""Share of frames in which an object must be seen to count as found."""

MIN_OVERLAP = 0.85
MIN_MARGIN = 0.03
"""A shape is named when its template overlaps the object by at least 0.85 (intersection over union,
mean over frames) and by 0.03 more than the next one; otherwise the shape is 'unclear'."""


@dataclass(frozen=True, eq=False)
class Track:
    """One object followed through F frames; entries of frames without it hold NaN or -1.

    Attributes:
        seen: bool (F,), whether it was found.
        whole: bool (F,), found and not cut by the bar: only these have a trustworthy place.
        positions: float64 (F, 2), centroid x, y in px.
        areas: float64 (F,), px.
        colours: int (F,), index into `COLOUR_NAMES`.
        overlaps: float64 (F, 3), overlap with each shape's template, in order of `SHAPES`.
    """

    seen: np.ndarray
    whole: np.ndarray
    positions: np.ndarray
    areas: np.ndarray
    colours: np.ndarray
    overlaps: np.ndarray

    @property
    def presence(self) -> float:
        """Share of frames in which the object is found."""
        return float(self.seen.mean())

    @property
    def hidden(self) -> int:
        """Frames without the object between two frames in which the bar cuts it."""
        frames = np.flatnonzero(self.seen)
        cut = ~self.whole[frames]
        return int((np.diff(frames) - 1)[cut[:-1] & cut[1:]].sum())

    @property
    def prominence(self) -> float:
        """Area summed over frames: how much of the video the object makes up."""
        return float(self.areas[self.seen].sum())

    @property
    def colour(self) -> str:
        """The colour of most frames."""
        return COLOUR_NAMES[int(np.bincount(self.colours[self.seen]).argmax())]

    @property
    def radius(self) -> float:
        """Radius in px of the circle of equal area, by the median over whole frames."""
        areas = self.areas[self.whole if self.whole.any() else self.seen]
        return float(np.sqrt(np.median(areas) / np.pi))

    @property
    def shape_evidence(self) -> np.ndarray:
        """(3,) mean overlap with each shape over the whole frames."""
        return self.overlaps[self.whole if self.whole.any() else self.seen].mean(0)

    @property
    def shape(self) -> str:
        """'circle', 'square', 'triangle', or 'unclear'."""
        evidence = self.shape_evidence
        second, best = np.sort(evidence)[-2:]
        clear = best >= MIN_OVERLAP and best - second >= MIN_MARGIN
        return SHAPES[int(evidence.argmax())] if clear else "unclear"


@dataclass(frozen=True, eq=False)
class Reading:
    """What the judge found in a video of F frames.

    Attributes:
        height, width: px.
        tracks: most prominent first.
        counts: int (F,), objects in each frame.
        strangers: int (F,), things in each frame that are no objects.
        bars: int (F, 2), left and right edge of the bar, or -1.
    """

    height: int
    width: int
    tracks: tuple[Track, ...]
    counts: np.ndarray
    strangers: np.ndarray
    bars: np.ndarray

    @property
    def objects(self) -> tuple[Track, ...]:
        """The tracks that last: seen in at least half of the frames, most prominent first."""
        return tuple(track for track in self.tracks if track.presence >= MIN_PRESENCE)

    @property
    def num_frames(self) -> int:
        return len(self.counts)

    @property
    def unit(self) -> float:
        """Pixels of this video to one pixel of a 64 x 64 picture."""
        return min(self.height, self.width) / 64
