"""The static filter before temporal_flickering: of many samples the first five that hold still.

Flicker is measured on videos that should not move, so those that move are left out. Upstream does
this in vbench/cli/static_filter.py, with RAFT, in the order of sorted file names (so -10 comes
before -2), and so it is here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from opensora.errors import DataError, UsageError, did_you_mean
from opensora.evaluate.vbench import measures
from opensora.evaluate.vbench.ledger import Ledger
from opensora.evaluate.vbench.measures import Measured
from opensora.evaluate.vbench.prompts import READ_SAMPLES
from opensora.evaluate.vbench.raft import SMALLEST_SIDE
from opensora.evaluate.vbench.tools import Tools
from opensora.evaluate.vbench.videos import Video
from opensora.evaluate.vbench.weights import RAFT_THINGS
from opensora.media.read import read_clip
from opensora.runtime import Runtime

TOP_SHARE = 0.02


def first_static(
    videos: Iterable[Video], is_static: Callable[[Video], bool], count: int = READ_SAMPLES
) -> list[Video]:
    """The first `count` videos that hold still, by sorted names; no more are looked at."""
    kept: list[Video] = []
    for video in sorted(videos, key=lambda one: one.path.name):
        if len(kept) == count:
            break
        if is_static(video):
            kept.append(video)
    return kept


def by_flow(tools: Tools, ledger: Ledger) -> Callable[[Video], bool]:
    """Upstream's rule on RAFT's flow; a video that cannot be read is not static."""

    def check(video: Video) -> bool:
        key = ledger.key(video.path, "static_filter", (RAFT_THINGS,))
        known = ledger.get(key)
        if known is not None:
            return bool(known.value)
        try:
            frames = read_clip(video.path).frames
            found = tools.magnitudes(frames, share=TOP_SHARE, both_ends=True)
        except DataError:  # it is named when its turn to be measured comes, or it never counts
            return False
        verdict = measures.is_static(found, len(frames), frames.shape[1:3])
        ledger.put(key, Measured(float(verdict)))
        return verdict

    return check


def large_enough(videos: Sequence[Video]) -> bool:
    """Whether the first readable video has a size that RAFT can look at."""
    for video in videos:
        try:
            return min(read_clip(video.path, num_frames=1).frames.shape[1:3]) >= SMALLEST_SIDE
        except DataError:
            continue
    return False


def by_list(path: str | Path, videos: Sequence[Video]) -> Callable[[Video], bool]:
    """A rule from a file: a JSON list of file names, or what upstream's static_filter.py writes.

    Raises:
        UsageError: the file cannot be read, has another form, or names a video that is not there.
    """
    listed = _names(Path(path))
    present = {video.path.name for video in videos}
    strange = sorted(listed - present)
    if strange:
        raise UsageError(
            f"static_list {path} names '{strange[0]}', which is no video of a prompt of "
            f"temporal_flickering.{did_you_mean(strange[0], sorted(present)[:200])}"
        )
    return lambda video: video.path.name in listed


def _names(path: Path) -> set[str]:
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"static_list {path} cannot be read: {error}") from None
    if isinstance(tree, dict) and all(isinstance(v, dict) for v in tree.values()):
        tree = [name for value in tree.values() for name in value.get("static_path", [])]
    if not isinstance(tree, list) or not all(isinstance(name, str) for name in tree):
        raise UsageError(f"static_list {path} is neither a list of file names nor upstream's file")
    return {Path(name).name for name in tree}


def filtered(
    groups: dict[str, list[Video]],
    is_static: Callable[[Video], bool],
    place: Runtime,
    progress: Callable[[int, int], None],
    *,
    count: int = READ_SAMPLES,
) -> dict[str, list[Video]]:
    """Prompt -> its first `count` static videos; ranks share the prompts."""
    mine = list(groups)[place.rank :: place.world_size]
    kept: dict[str, list[Video]] = {}
    for number, prompt in enumerate(mine):
        kept[prompt] = first_static(groups[prompt], is_static, count)
        progress(number + 1, len(mine))
    together: dict[str, list[Video]] = {}
    for part in place.gather_objects(kept):
        together |= part
    return {prompt: together[prompt] for prompt in groups}
