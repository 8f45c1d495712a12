"""Media are embedded within the budget, linked beyond it, and refused where they do not belong."""

import base64
import os
from urllib.parse import unquote

import numpy as np
import pytest

from opensora.media.read import read_clip
from opensora.media.write import write_video
from opensora.report.clips import Shelf, _shrunk
from opensora.report.reading import Notes
from tests.report.conftest import moving_square, parse


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def shelf(root, budget=10**6, folder=None):
    return Shelf(root, folder or root, budget, Notes(root))


def content(address: str, kind: str) -> bytes:
    prefix = f"data:{kind};base64,"
    assert address.startswith(prefix)
    return base64.b64decode(address[len(prefix) :], validate=True)


def test_a_video_is_embedded_whole_with_a_still_and_its_size(root):
    path = write_video(root / "a.mp4", moving_square(), fps=8)
    video = parse(shelf(root).player(path, "a square")).one("video").attributes
    assert content(video["src"], "video/mp4") == path.read_bytes()
    assert content(video["poster"], "image/png").startswith(b"\x89PNG")
    assert (video["width"], video["height"], video["aria-label"]) == ("16", "16", "a square")
    assert video["class"] == "pixelated"
    assert {"autoplay", "muted", "loop", "playsinline"} <= video.keys()
    assert "controls" not in video


@pytest.mark.parametrize(("suffix", "kind"), [(".gif", "image/gif"), (".png", "image/png")])
def test_pictures_are_embedded_as_pictures(root, suffix, kind):
    path = write_video(root / f"a{suffix}", moving_square(), fps=8)
    image = parse(shelf(root).player(path, "a square")).one("img").attributes
    assert content(image["src"], kind) == path.read_bytes()
    assert image["alt"] == "a square"


def test_beyond_the_budget_a_clip_is_linked_from_the_page_and_does_not_autoplay(root, tmp_path):
    path = write_video(root / "sub dir" / "ü #1%.mp4", moving_square(), fps=8)
    page_folder = tmp_path / "elsewhere"
    page_folder.mkdir()
    place = shelf(root, budget=0, folder=page_folder)
    video = parse(place.player(path, "x")).one("video").attributes
    assert video["src"] == "../root/sub%20dir/%C3%BC%20%231%25.mp4"
    assert (page_folder / unquote(video["src"])).resolve() == path
    assert "controls" in video
    assert not video.keys() & {"autoplay", "poster"}
    assert place.num_linked == 1


def test_the_budget_is_kept_to_the_byte(root):
    path = write_video(root / "a.mp4", moving_square(), fps=8)
    generous = shelf(root)
    text = generous.player(path, "")
    spent = 10**6 - generous.bytes_left
    attributes = parse(text).one("video").attributes
    assert spent == sum(len(attributes[k].partition(",")[2]) for k in ("src", "poster"))
    exact, short = shelf(root, budget=spent), shelf(root, budget=spent - 1)
    exact.player(path, "")
    short.player(path, "")
    assert (exact.bytes_left, exact.num_linked) == (0, 0)
    assert short.num_linked == 1


def test_large_clips_are_not_pixelated_and_their_still_is_small(root):
    path = write_video(root / "a.mp4", np.zeros((1, 300, 620, 3), np.uint8), fps=8)
    video = parse(shelf(root).player(path, "")).one("video").attributes
    assert "class" not in video
    assert (video["width"], video["height"]) == ("620", "300")
    still = content(video["poster"], "image/png")
    width, height = (int.from_bytes(still[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (206, 100)


def test_shrinking_averages_blocks():
    frame = np.arange(512 * 300 * 3, dtype=np.uint32).reshape(300, 512, 3).astype(np.uint8)
    small = _shrunk(frame)
    assert small.shape == (150, 256, 3)
    assert small[7, 9].tolist() == frame[14:16, 18:20].mean((0, 1)).round().tolist()
    assert _shrunk(np.zeros((2, 5000, 3), np.uint8)).shape == (1, 250, 3)


def test_files_outside_the_root_are_linked_unopened_however_they_are_reached(root, tmp_path):
    secret = write_video(tmp_path / "secret.mp4", moving_square(), fps=8)
    secret.chmod(0)
    (root / "link.mp4").symlink_to(secret)
    for path in (root / ".." / "secret.mp4", secret, root / "link.mp4"):
        place = shelf(root)
        video = parse(place.player(path, "")).one("video").attributes
        assert video["src"] == "../secret.mp4"
        assert not video.keys() & {"autoplay", "poster", "width"}
        assert (place.num_outside, place.bytes_left) == (1, 10**6)


def test_a_link_cannot_dress_another_file_as_a_video(root, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("password")
    (root / "a.mp4").symlink_to(secret)
    place = shelf(root)
    assert "secret" not in place.player(root / "a.mp4", "")
    assert place.notes.entries == [("a.mp4", "is a link out of the reported folder")]


def test_stills_hold_the_first_frame_exactly(root):
    path = write_video(root / "a.mp4", moving_square(side=22), fps=8)
    video = parse(shelf(root).player(path, "")).one("video").attributes
    (root / "still.png").write_bytes(content(video["poster"], "image/png"))
    np.testing.assert_array_equal(
        read_clip(root / "still.png").frames[0], read_clip(path).frames[0]
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.mp4", "does not exist"),
        ("nul\0.mp4", "does not exist"),
        ("text.html", "is none of"),
        ("folder.mp4", "is not a file"),
        ("pipe.mp4", "is not a file"),
        ("broken.mp4", "broken.mp4"),
        ("empty.png", "empty.png"),
        ("loop.mp4", "does not exist"),
    ],
)
def test_what_cannot_be_shown_is_said_in_its_place_and_noted(root, name, reason):
    (root / "text.html").write_text("<script>alert(1)</script>")
    (root / "folder.mp4").mkdir()
    os.mkfifo(root / "pipe.mp4")
    (root / "broken.mp4").write_bytes(b"\0\0\0\x18ftypisom" + b"\xff" * 500)
    (root / "empty.png").touch()
    (root / "loop.mp4").symlink_to("loop.mp4")
    place = shelf(root)
    page = parse(place.player(root / name, "x"))
    assert page.children[0].attributes["class"] == "missing"
    assert reason in place.notes.entries[0][1]
