import numpy as np
import pytest

from opensora.errors import UsageError
from opensora.media.sheet import contact_sheet


def clip(count: int, height: int, width: int, first: int = 0) -> np.ndarray:
    levels = np.arange(first, first + count, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(levels, (count, height, width, 3)).copy()


def test_one_clip_fills_rows_from_the_left():
    sheet = contact_sheet(clip(5, 2, 3), columns=2, gap=1, background=(9, 8, 7))
    assert sheet.shape == (3 * 3 - 1, 2 * 4 - 1, 3)
    assert (sheet[0:2, 0:3] == 0).all()
    assert (sheet[0:2, 4:7] == 1).all()
    assert (sheet[6:8, 0:3] == 4).all()
    assert (sheet[6:8, 4:7] == (9, 8, 7)).all()
    assert (sheet[:, 3] == (9, 8, 7)).all()


def test_several_clips_take_a_row_each_with_frames_from_first_to_last():
    sheet = contact_sheet([clip(9, 2, 2), clip(2, 4, 6, first=100)], columns=3, gap=0)
    assert sheet.shape == (8, 18, 3)
    assert [sheet[1, 6 * column + 2, 0] for column in range(3)] == [0, 4, 8]
    assert [sheet[4, 6 * column, 0] for column in range(3)] == [100, 101, 255]
    assert (sheet[0] == 255).all()  # the small clip sits in the middle of its row


@pytest.mark.parametrize(
    "clips", [[], [np.zeros((0, 2, 2, 3), np.uint8)], [np.zeros((1, 2, 2, 3))], np.zeros((2, 2, 3))]
)
def test_what_is_no_clip_is_refused(clips):
    with pytest.raises(UsageError):
        contact_sheet(clips)


def test_impossible_layouts_are_refused():
    with pytest.raises(UsageError, match="columns"):
        contact_sheet(clip(1, 2, 2), columns=0)
