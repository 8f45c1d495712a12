from fractions import Fraction

import av
import numpy as np
import pytest
from media_support import MPEG4, encode, numbered_frames, numbers

from opensora.errors import DataError, UsageError
from opensora.media.read import read_clip
from opensora.media.source import Limits, opened
from opensora.media.write import write_image, write_video


def test_all_frames_come_in_order_with_their_times(mp4):
    clip = read_clip(mp4)
    assert numbers(clip.frames) == list(range(48))
    assert clip.frames.dtype == np.uint8
    assert clip.frames.flags.c_contiguous
    assert clip.timestamps == pytest.approx(np.arange(48) / 24)
    assert clip.fps == 24.0
    assert clip.path == str(mp4)


@pytest.mark.parametrize("start", [0.0, 0.3, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("fps", [6, 8, 24, 25, 60, Fraction(30000, 1001)])
def test_a_resampled_clip_shows_what_a_viewer_would_see(mp4, start, fps):
    clip = read_clip(mp4, num_frames=7, fps=fps, start=start) if start < 1 else None
    clip = clip or read_clip(mp4, num_frames=2, fps=fps, start=start)
    times = start + np.arange(len(clip.frames)) / float(fps)
    assert clip.timestamps == pytest.approx(times)
    assert numbers(clip.frames) == [int(t * 24 + 1e-4) for t in times]
    assert clip.fps == float(fps)


def test_late_clips_decode_from_the_key_frame_before_them_only(mp4):
    with opened(mp4, Limits()) as source:
        keys = [source.seconds(p.pts) for p in source.packets if p.size and p.is_keyframe]
    with opened(mp4, Limits(), target=1.6) as source:
        decoded = [f for p in source.packets for f in source.decoder.decode(p)]
        first = source.seconds(decoded[0].pts)
    assert first == max(key for key in keys if key <= 1.6)
    assert first > 1.0


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.webm", "clip.avi", "clip.ts"])
def test_every_start_gives_the_same_frames_as_reading_from_the_beginning(tmp_path, frames, name):
    codec = {"webm": "libvpx-vp9", "avi": "mpeg4"}.get(name.split(".")[1], "libx264")
    options = MPEG4 if codec == "mpeg4" else {"crf": "10", "g": "12"}
    path = encode(tmp_path / name, frames, codec=codec, options=options)
    whole = read_clip(path)
    assert numbers(whole.frames) == list(range(48))
    for first in (1, 11, 12, 13, 30, 45):
        clip = read_clip(path, start=float(whole.timestamps[first]), num_frames=3)
        assert np.array_equal(clip.frames, whole.frames[first : first + 3])


def test_variable_rates_are_read_by_time(tmp_path):
    ticks = [0, 40, 80, 500, 540, 900, 1000]  # milliseconds
    path = encode(
        tmp_path / "variable.mkv",
        numbered_frames(7),
        ticks=ticks,
        time_base=Fraction(1, 1000),
        options={"crf": "10", "bf": "2"},
    )
    clip = read_clip(path)
    assert clip.timestamps == pytest.approx(np.array(ticks) / 1000)
    assert clip.fps == pytest.approx(6.0)
    assert numbers(read_clip(path, fps=10, num_frames=10).frames) == [0, 2, 2, 2, 2, 3, 4, 4, 4, 5]


def test_times_count_from_the_start_of_the_stream_wherever_its_clock_starts(tmp_path, frames):
    path = encode(tmp_path / "late.ts", frames, ticks=range(240, 288))
    clip = read_clip(path, num_frames=3, fps=8, start=0.5)
    assert numbers(clip.frames) == [12, 15, 18]
    assert clip.timestamps[0] == 0.5


def test_frames_that_an_edit_list_leaves_out_are_not_shown(videos):
    assert len(read_clip(videos / "discard_first_keyframe.mp4").frames) == 25


def test_start_and_end_take_a_half_open_range(mp4):
    assert numbers(read_clip(mp4, start=0.5, end=1.0).frames) == list(range(12, 24))
    assert numbers(read_clip(mp4, start=0.5, end=1.0, fps=6).frames) == [12, 16, 20]
    assert numbers(read_clip(mp4, end=2.0).frames) == list(range(48))


def test_the_last_frame_covers_half_an_interval_past_the_end(mp4):
    assert numbers(read_clip(mp4, start=1.5, num_frames=3, fps=4 - 0.05).frames) == [36, 42, 47]
    for beyond in ({"start": 2.5}, {"num_frames": 49}, {"end": 2.1}, {"fps": 8, "end": 2.2}):
        with pytest.raises(DataError, match=r"numbered.mp4' cannot give .* ends at 2\.000 s"):
            read_clip(mp4, **beyond)


def test_an_image_is_a_clip_of_one_frame(tmp_path, frames):
    path = write_image(tmp_path / "image.png", frames[9])
    clip = read_clip(path, num_frames=1, fps=24)
    assert np.array_equal(clip.frames, frames[9:10])


@pytest.mark.parametrize(
    "name",
    [
        "-leading-dash.mp4",
        "a:b.mp4",
        "http:x.mp4",
        "%03d.mp4",
        "é 影片 'q' \".mp4",
        "new\nline.mp4",
        "concat:a|b.mp4",
        "no suffix",
    ],
)
def test_any_name_can_be_read_from_its_own_folder(tmp_path, mp4, monkeypatch, name):
    (tmp_path / name).write_bytes(mp4.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(read_clip(name, num_frames=2).frames) == 2


def test_two_threads_give_the_same_frames_as_one(mp4):
    assert np.array_equal(read_clip(mp4, threads=2).frames, read_clip(mp4).frames)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"backend": "opencv"}, "backend is 'opencv'"),
        ({"on_damage": "skip"}, "on_damage is 'skip'"),
        ({"threads": 0}, "threads is 0"),
        ({"backend": "decord"}, "on_damage='keep'"),
        ({"num_frames": 0}, "num_frames"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(mp4, arguments, said):
    with pytest.raises(UsageError, match=said):
        read_clip(mp4, **arguments)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_pixels_per_frame": 64 * 48 - 1}, "64x48 = 3072 pixels"),
        ({"max_frames": 47}, "max_frames=47"),
        ({"max_bytes": 48 * 64 * 48 * 3 - 1}, "max_bytes"),
        ({"max_seconds": 1e-9}, "max_seconds"),
    ],
)
def test_a_file_that_wants_more_than_the_limits_is_refused(mp4, limits, said):
    with pytest.raises(DataError, match=said) as caught:
        read_clip(mp4, limits=Limits(**limits))
    assert str(mp4) in str(caught.value)


def test_the_largest_stream_is_read_and_cover_art_is_not(tmp_path, videos):
    # Its first video stream is 320x180; FFmpeg ranks the fourth stream, 480x270, best.
    assert read_clip(videos / "nasa_13013.mp4", num_frames=1).frames.shape[1:3] == (270, 480)
    path = tmp_path / "song.mka"
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(DataError, match="no video stream; it holds audio"):
        read_clip(path)


def test_written_and_read_frames_agree_in_number_for_every_format(tmp_path, frames):
    for suffix in (".mp4", ".webm", ".gif"):
        clip = read_clip(write_video(tmp_path / f"clip{suffix}", frames[:17], fps=8))
        assert numbers(clip.frames) == list(range(17)), suffix
        assert clip.fps == pytest.approx(8, abs=0.02), suffix
