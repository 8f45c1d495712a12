"""Frames of one or several clips laid out in one picture, for pages and readers of text.

Arrays in, an array out: writing it is for `opensora.media.write`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opensora.errors import UsageError


def contact_sheet(
    clips: np.ndarray | Sequence[np.ndarray],
    *,
    columns: int = 8,
    gap: int = 4,
    background: tuple[int, int, int] = (255, 255, 255),
) -> np.ndarray:
    """Frames side by side in one picture.

    One clip fills the sheet row by row with all its frames. Several clips take a row each, with
    `columns` frames spread evenly from the first to the last (a shorter clip shows all it has).
    Cells are as large as the largest frame; smaller frames sit in their middle.

    Args:
        clips: one clip, uint8 (F, H, W, 3), or a sequence of clips of any sizes.
        columns: frames in a row.
        gap: pixels between cells; none around the sheet.
        background: RGB, 0 to 255, of the gaps and of cells without a frame.

    Returns:
        uint8 (H, W, 3).

    Raises:
        UsageError: when there is no frame, or a clip is not uint8 (F, H, W, 3).
    """
    if columns < 1 or gap < 0:
        raise UsageError(f"a sheet needs columns >= 1 and gap >= 0, got {columns} and {gap}")
    single = isinstance(clips, np.ndarray) and clips.ndim == 4
    rows = []
    for clip in [np.asarray(clips)] if single else [np.asarray(clip) for clip in clips]:
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or not len(clip):
            found = f"{clip.dtype} {clip.shape}"
            raise UsageError(f"a clip of a sheet is uint8 (F, H, W, 3) with F >= 1, got {found}")
        if single:
            rows.extend(clip[i : i + columns] for i in range(0, len(clip), columns))
        else:
            shown = np.linspace(0, len(clip) - 1, min(columns, len(clip)))
            rows.append(clip[shown.round().astype(int)])
    if not rows:
        raise UsageError("a sheet needs at least one clip")
    height, width = (max(row.shape[axis] for row in rows) for axis in (1, 2))
    count = max(len(row) for row in rows)
    shape = (len(rows) * (height + gap) - gap, count * (width + gap) - gap, 3)
    sheet = np.empty(shape, np.uint8)
    sheet[:] = background
    for i, row in enumerate(rows):
        top = i * (height + gap) + (height - row.shape[1]) // 2
        for j, frame in enumerate(row):
            left = j * (width + gap) + (width - row.shape[2]) // 2
            sheet[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
    return sheet
