"""Every file of the shared collection reads as its manifest says, or is refused for a reason."""

import csv

import pytest
from media_support import VIDEOS

from opensora.errors import DataError
from opensora.media.probe import probe
from opensora.media.read import read_clip

REFUSED = {
    "audio_only_nasa.mp3": "no video stream; it holds audio",
    "audio_only_sine.wav": "no video stream; it holds audio",
    "corrupted_decord.mp4": "packet 31 cannot be decoded .* 28 of 50 frames decoded",
    "derived_empty.mp4": r"is empty \(0 bytes\)",
    "derived_not_a_video.mp4": "cannot be opened as a video",
    "derived_truncated_half.mp4": "cannot be opened as a video",
    "derived_truncated_tail.mkv": r"ends at 1\.633 s of the 2\.966 s that it promises; 49 frames",
    "derived_zeroed_2kB.mkv": "packet 10 holds a region of zero bytes",
}
KEPT = {"corrupted_decord.mp4": 28, "derived_truncated_tail.mkv": 49, "derived_zeroed_2kB.mkv": 89}
# What timestamps average to, where the manifest gives the rate that the header announces.
MEASURED_FPS = {
    "derived_vfr_nasa.mkv": 26.78,
    "people_detection.gif": 12.02,
    "person_bicycle_car.gif": 12.01,
}
# The manifest names decoders; these are the codecs, and the alpha plane that its decoder dropped.
CODECS = {"libdav1d": "av1"}
PIXEL_FORMATS = {"alpha_vp9.webm": "yuva420p"}


def rows() -> list[dict[str, str]]:
    manifest = VIDEOS / "MANIFEST.csv"
    if not manifest.is_file():
        return []
    with open(manifest, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def readable() -> list:
    return [pytest.param(row, id=row["file"]) for row in rows() if row["file"] not in REFUSED]


def test_the_collection_is_whole(videos):
    assert len(rows()) == 57
    assert set(REFUSED) <= {row["file"] for row in rows()}


@pytest.mark.parametrize("row", readable())
def test_probing_agrees_with_the_manifest(videos, row):
    found = probe(videos / row["file"])
    sides = (found.width, found.height)
    assert sides[:: -1 if found.rotation % 180 else 1] == (int(row["width"]), int(row["height"]))
    assert found.num_frames == int(row["frames"])
    assert found.nominal_fps == pytest.approx(float(row["fps"]), abs=0.006)
    assert found.fps == pytest.approx(MEASURED_FPS.get(row["file"], float(row["fps"])), abs=0.006)
    # The manifest counts counter-clockwise.
    assert found.rotation == -int(row["rotation"]) % 360
    assert found.codec == CODECS.get(row["codec"], row["codec"])
    assert found.pixel_format == PIXEL_FORMATS.get(row["file"], row["pix_fmt"])
    assert found.variable_rate == (row["vfr"] == "1")
    assert found.start == pytest.approx(float(row["start_s"]), abs=0.001)
    assert found.has_audio == bool(row["audio"])
    assert found.damage is None


@pytest.mark.parametrize("row", readable())
def test_reading_agrees_with_the_manifest(videos, row):
    count, width, height = (int(row[key]) for key in ("frames", "width", "height"))
    # Decoding every frame of the large files takes long; their counts are checked by probing.
    large = count * width * height > 30_000_000
    clip = read_clip(videos / row["file"], num_frames=8 if large else None)
    upright = (width, height) if int(row["rotation"]) % 180 else (height, width)
    assert clip.frames.shape == (8 if large else count, *upright, 3)
    assert clip.timestamps[0] == 0.0
    if not large:
        rate = MEASURED_FPS.get(row["file"], float(row["fps"]))
        assert clip.fps == pytest.approx(rate, abs=0.006)


@pytest.mark.slow
@pytest.mark.parametrize("row", readable())
def test_reading_every_frame_agrees_with_the_manifest(videos, row):
    assert len(read_clip(videos / row["file"]).frames) == int(row["frames"])


@pytest.mark.parametrize("name", REFUSED)
def test_damaged_files_are_refused_with_their_reason(videos, name):
    with pytest.raises(DataError, match=f"{name}.*{REFUSED[name]}"):
        read_clip(videos / name)


@pytest.mark.parametrize("name", KEPT)
def test_what_is_left_of_damaged_files_can_be_kept(videos, name):
    clip = read_clip(videos / name, on_damage="keep")
    assert len(clip.frames) >= KEPT[name]
    assert probe(videos / name, count="decode").damage is not None


def test_no_frame_of_the_file_full_of_cuts_depends_on_where_reading_starts(videos):
    path = videos / "bikes_scene_cuts.mp4"
    whole = read_clip(path, num_frames=100)
    for first in (1, 37, 60, 96):
        part = read_clip(path, start=float(whole.timestamps[first]), num_frames=3)
        assert (part.frames == whole.frames[first : first + 3]).all()
