"""Options of `opensora sample` become jobs, and contradictions are told in one line."""

from pathlib import Path

import numpy as np
import pytest

from opensora.cli.asked import Frames, Size, Words, jobs_of
from opensora.cli.main import invoke
from opensora.errors import DataError, UsageError
from opensora.infer.conditions import Reference, read_frames
from opensora.infer.records import read_records
from opensora.media.picture import read_picture
from opensora.media.write import write_video
from tests.infer.conftest import build_pipeline
from tests.infer.test_conditions import moving
from tests.infer.test_pipeline import save_run


@pytest.fixture
def picture(tmp_path) -> Path:
    return write_video(tmp_path / "a.png", moving(1), fps=1)


@pytest.fixture
def video(tmp_path) -> Path:
    return write_video(tmp_path / "b.mp4", moving(17), fps=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_run(build_pipeline(), folder, averages=1.0)
    return folder


def test_pictures_and_videos_go_to_the_ends(picture, video):
    assert Frames(first=picture).references(8, 4) == (Reference(str(picture), count=1),)
    assert Frames(last=picture).references(8, 4) == (Reference(str(picture), at=-1, count=1),)
    first = Frames(first=video).references(8, 4)
    assert first == (Reference(str(video), start=-2, count=2),)  # a quarter of the clip
    last = Frames(last=video, num_given=9).references(8, 4)
    assert last == (Reference(str(video), at=-3, count=3),)
    looped = Frames(first=picture, loop=True).references(8, 4)
    assert [reference.at for reference in looped] == [0, -1]
    edited = Frames(edit=video, strength=0.3).references(8, 4)
    assert edited == (Reference(str(video), level=0.3),)


def test_keyframes_are_evenly_spaced(picture, video):
    found = Frames(keyframes=[picture, video, picture]).references(5, 4)
    assert [reference.at for reference in found] == [0, 2, 4]


def test_contradictions_and_missing_files_are_refused(picture, video, tmp_path):
    for frames, told in (
        (Frames(loop=True), "--loop needs"),
        (Frames(first=picture, last=picture, loop=True), "leave out --last"),
        (Frames(first=picture, drawn=True), "give no frames beside it"),
        (Frames(keyframes=[picture]), "two or more"),
        (Frames(keyframes=[picture] * 5), "leave nothing to draw"),
        (Frames(last=video, num_given=17), "leaves nothing to draw of 17 frames"),
    ):
        with pytest.raises(UsageError, match=told):
            frames.references(5, 4)
    with pytest.raises(DataError, match=r"none\.png"):
        Frames(first=tmp_path / "none.png").references(5, 4)


def test_lines_add_to_what_is_given_to_all(picture):
    words = Words(['a dog{"reference_path": "x.png"}', "|0|day|1|night"], motion=4.0)
    lines = words.said(words.read(), {"a dog": "a brown dog"})
    jobs = jobs_of(lines, Frames(first=picture), seed=7, per_prompt=2, latents=5, stride=4)
    assert [job.seed for job in jobs] == [7, 8, 9, 10]
    assert jobs[0].prompts == ("a brown dog motion score: 4.0.",)
    assert [Path(r.path).name for r in jobs[0].references] == ["a.png", "x.png"]
    assert jobs[2].prompts == ("day motion score: 4.0.", "night motion score: 4.0.")
    plain = jobs_of(Words(["a dog"]).read(), Frames(), seed=0, per_prompt=1, latents=5, stride=4)
    assert plain[0].record == {"index": 0, "prompt": "a dog", "seed": 0}


@pytest.mark.parametrize(
    ("size", "found"),
    [
        (Size(), (5, 32, 32)),
        (Size(num_frames=9, height=48, width=16), (9, 48, 16)),
        (Size(resolution="64px"), (5, 64, 64)),
        (Size(resolution="64px", aspect="4:1"), (5, 32, 128)),
        (Size(aspect="1:4"), (5, 64, 16)),
    ],
)
def test_sizes_may_be_named(size, found, pipeline):
    shape = size.shape(pipeline)
    assert (shape.num_frames, shape.height, shape.width) == found


@pytest.mark.parametrize(
    "size",
    [
        Size(resolution="big"),
        Size(aspect="16/9"),
        Size(aspect="0:1"),
        Size(aspect="nan:1"),
        Size(resolution="64px", height=32),
    ],
)
def test_sizes_that_mean_nothing_are_refused(size, pipeline):
    with pytest.raises(UsageError, match="--aspect"):
        size.shape(pipeline)


def test_sizes_that_do_not_fit_are_told_with_the_nearest_that_do(pipeline):
    with pytest.raises(UsageError, match="--frames 5 or 9, or any number with --long"):
        Size(num_frames=6).shape(pipeline)
    assert Size(num_frames=6).shape(pipeline, any_length=True).num_frames == 6
    with pytest.raises(UsageError, match="--height 96 --width 32"):
        Size(height=101, width=37).shape(pipeline)


def sample(run: Path, output: Path, *options: object) -> list[np.ndarray]:
    words = ("sample", run, "a red circle", "-o", output, "--steps", 2, "--device", "cpu")
    assert invoke([str(word) for word in (*words, *options)]) == 0
    return [read_frames(output / record["file"], fps=8) for record in read_records(output)]


def test_a_video_begins_with_the_picture_that_is_given(run, tmp_path, picture):
    (free,) = sample(run, tmp_path / "free")
    (given,) = sample(run, tmp_path / "given", "--first", picture)
    assert given.shape == free.shape
    assert not np.array_equal(given, free)
    record = read_records(tmp_path / "given")[0]
    assert record["references"][0]["path"] == str(picture)
    drawn_first = sample(run, tmp_path / "drawn", "--picture-first")[0]
    assert not np.array_equal(drawn_first, free)


def test_calls_without_a_folder_get_their_own(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*options: str) -> tuple[Path, str]:
        words = ["sample", str(run), "a red circle", "--steps", "2", "--device", "cpu", *options]
        assert invoke(words) == 0
        told = capsys.readouterr()
        (file,) = map(Path, told.out.split())
        return file, told.err

    first, _ = call()
    assert first.match("outputs/samples/a-red-circle-*/0000-a-red-circle.mp4")
    written = first.stat().st_mtime_ns
    again, told = call()
    assert again == first and first.stat().st_mtime_ns == written
    assert "1 of 1 were drawn before and are kept" in told
    others = [call(*words)[0] for words in (["--seed", "1"], ["--guidance", "2"], ["--fps", "4"])]
    assert len({first.parent, *(file.parent for file in others)}) == 4
    picture, told = call("--frames", "1")
    assert picture.suffix == ".png" and "kept" not in told


def test_a_file_of_prompts_is_not_drawn_as_a_prompt(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a dog")
    with pytest.raises(UsageError, match="for the prompts in it: --file"):
        Words([str(file)]).read()


def test_arithmetic_of_the_denoiser_can_be_chosen(run, tmp_path):
    plain, narrow = (sample(run, tmp_path / d, "--dtype", d)[0] for d in ("fp32", "bf16"))
    assert not np.array_equal(plain, narrow)
    assert np.abs(plain.astype(int) - narrow).mean() < 8
    assert read_records(tmp_path / "bf16")[0]["weights"].endswith(" bf16")


def test_prompts_are_utf8_whatever_the_locale_says():
    typed = "caf\u00e9 一".encode().decode("ascii", "surrogateescape")
    ((text, _),) = Words([typed]).read()
    assert text == "caf\u00e9 一"
    with pytest.raises(UsageError, match="no UTF-8 text"):
        Words([b"caf\xe9".decode("utf-8", "surrogateescape")]).read()


@pytest.mark.parametrize("name", ["https://example.com/a.png", "a.tiff", "a.heic"])
def test_what_frames_are_not_read_from_is_said_to_be_so(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(Path(name).name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"nothing is downloaded|picture that is not read"):
        Frames(first=Path(name)).references(5, 4)


def test_a_video_may_be_any_number_of_frames_long(run, tmp_path):
    for kind, overlap in (("windows", ["--overlap", 1]), ("pyramid", [])):
        options = ("--long", kind, "--frames", 22, *overlap)
        (video,) = sample(run, tmp_path / kind, *options)
        assert video.shape == (22, 32, 32, 3)


def test_a_grid_shows_every_video_or_every_picture(run, tmp_path):
    sample(run, tmp_path / "videos", "--per-prompt", 3, "--grid")
    assert read_picture(tmp_path / "videos/grid.png").shape == (3 * 36 - 4, 5 * 36 - 4, 3)
    sample(
        run, tmp_path / "pictures", "--per-prompt", 3, "--frames", 1, "--format", "png", "--grid"
    )
    assert read_picture(tmp_path / "pictures/grid.png").shape == (68, 68, 3)
    sample(run, tmp_path / "long", "--long", "windows", "--overlap", 1, "--frames", 22, "--grid")
    assert read_picture(tmp_path / "long/grid.png").shape == (32, 6 * 36 - 4, 3)


def test_any_key_of_the_sampling_config_can_be_set(run, tmp_path, picture):
    plain = sample(run, tmp_path / "plain", "--first", picture)[0]
    guided = sample(
        run, tmp_path / "guided", "--first", picture, "--set", "guidance.frames_scale=4"
    )[0]
    assert not np.array_equal(plain, guided)
    weaker = sample(run, tmp_path / "weaker", "--first", picture, "--guide-with", run)[0]
    assert not np.array_equal(plain, weaker)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--long", "window"], "Did you mean 'windows'"),
        (["--set", "guidance.frame_scale=2"], "Did you mean 'frames_scale'"),
        (["--set", "guidance"], "is not an override"),
        (["--long", "windows", "--overlap", "9", "--frames", "30"], "at most one less"),
        (["--mask-strategy", "0"], "has no reference_path"),
        (["--set", "guidance.frames_scale=2"], "needs given frames"),
        (["--first", "none.png"], "none.png"),
        (["--overlap", "1"], "--long windows"),
        (["--long", "pyramid", "--overlap", "1"], "--long windows"),
        (["--share", "sequence"], "torchrun"),
        (["--frames", "6"], "--frames 5 or 9"),
        (["--num-frames", "5"], "here it is --frames"),
        (["--dtype", "fp8"], "--dtype fp8 is unknown"),
    ],
)
def test_what_makes_no_sense_is_one_line(run, options, told, tmp_path, capsys):
    words = ["sample", str(run), "a dog", "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert invoke([*words, "--steps", "2", *options]) in (64, 65)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("opensora: ")
    assert told in line
    assert not list(tmp_path.glob("out/*.mp4"))


@pytest.mark.dist
@pytest.mark.xdist_group("train-faults")
@pytest.mark.parametrize(
    ("share", "cache"), [("sequence", None), ("sequence", "teacache"), ("guidance", "teacache")]
)
def test_two_ranks_that_share_a_video_write_what_one_writes(share, cache, run, tmp_path, picture):
    """In uint8 after x264, so equal up to rounding; latents are held to 1e-4 elsewhere."""
    from tests.train.forked import Ranks

    spared = ["--cache", cache, "--set", "cache.levels=[0,1]"] if cache else []
    alone = sample(run, tmp_path / "alone", "--first", picture, "--per-prompt", 2, *spared)
    words = [
        "sample",
        run,
        "a red circle",
        "-o",
        tmp_path / "both",
        "--steps",
        2,
        "--device",
        "cpu",
    ]
    words += ["--first", picture, "--per-prompt", 2, "--share", share, *spared]
    arguments = [str(word) for word in words]
    ranks = Ranks(arguments, tmp_path / "ranks")
    assert ranks.wait() == [0, 0], ranks.told(0) + ranks.told(1)
    records = read_records(tmp_path / "both")
    assert len((tmp_path / "both/samples.jsonl").read_text().splitlines()) == 2
    for record, video in zip(records, alone, strict=True):
        found = read_frames(tmp_path / "both" / record["file"], fps=8)
        assert np.abs(found.astype(int) - video).mean() < 0.1
