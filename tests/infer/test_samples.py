"""A folder of samples: resumable, of one kind, and with names that harm nobody."""

import json
from dataclasses import replace

import numpy as np
import pytest

from opensora.errors import DataError, StorageError, UsageError
from opensora.infer.conditions import Reference
from opensora.infer.jobs import Job, jobs, read_prompts
from opensora.infer.pipeline import Sample, SamplingConfig
from opensora.infer.records import RECORD_NAME, read_records
from opensora.infer.samples import draw
from opensora.media.read import read_clip
from opensora.media.write import write_image
from tests.evaluate.vbench.ranks import on_ranks
from tests.infer.conftest import SHAPE, WHOLE, build_pipeline

QUICK = SamplingConfig.model_validate({"schedule": {"num_steps": 1}})
PROMPTS = ["a red circle", "a blue square", "a green triangle", "two red circles", "a star"]


class Painter:
    """Stands in for a pipeline: grey frames whose level tells the seed.

    Attributes:
        drawn: the batches that were asked for.
    """

    team = None
    savings, weaker = WHOLE, None
    fingerprint = "painter"
    shape = SHAPE

    def __init__(self):
        self.drawn: list[list[str]] = []

    def latent_shape(self, shape):
        return (4, 2, 4, 4)

    def __call__(self, prompts, *, seeds, shape, sampling, negative_prompt):
        self.drawn.append(list(prompts))
        size = (shape.num_frames, shape.height, shape.width, 3)
        return [
            Sample(p, s, np.full(size, 20 * s % 250, np.uint8), shape.fps)
            for p, s in zip(prompts, seeds, strict=True)
        ]


@pytest.fixture
def painter():
    return Painter()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_prompt_becomes_a_file_and_a_record(painter, tmp_path):
    told = []
    records = draw(
        painter, jobs(PROMPTS, seed=3), tmp_path, sampling=QUICK, batch_size=2,
        progress=lambda *numbers: told.append(numbers),
    )  # fmt: skip
    assert names(tmp_path) == [*(r["file"] for r in records), "samples.jsonl"]
    assert [r["seed"] for r in records] == [3, 4, 5, 6, 7]
    assert [len(batch) for batch in painter.drawn] == [2, 2, 1]
    assert told == [(0, 5), (2, 5), (4, 5), (5, 5)]
    assert read_records(tmp_path) == records
    clip = read_clip(tmp_path / records[2]["file"])
    assert (clip.frames.shape, clip.fps) == ((5, 32, 32, 3), 8.0)
    assert abs(int(clip.frames.mean()) - 100) <= 2


def test_a_stopped_call_is_completed_by_the_same_call(painter, tmp_path):
    work = jobs(PROMPTS, seed=0)
    whole = draw(painter, work, tmp_path, sampling=QUICK)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / whole[4]["file"]).unlink()  # died before its file
    (tmp_path / "samples.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    left = [path.stat().st_mtime_ns for path in tmp_path.glob("000[01]*")]
    again = Painter()
    records = draw(again, work, tmp_path, sampling=QUICK)
    assert again.drawn == [PROMPTS]  # the whole batch, so that last bits are those of before
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("000[01]*")] == left
    assert records == whole
    assert read_records(tmp_path) == whole  # the torn line took none with it
    third = Painter()
    draw(third, work, tmp_path, sampling=QUICK)
    assert third.drawn == []


def test_a_lost_video_is_drawn_again_and_counted_once(painter, tmp_path):
    work = jobs(PROMPTS, seed=0)
    whole = draw(painter, work, tmp_path, sampling=QUICK, batch_size=2)
    (tmp_path / whole[1]["file"]).unlink()
    draw(painter, work, tmp_path, sampling=QUICK, batch_size=2)
    assert painter.drawn[3:] == [PROMPTS[:2]]
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 6
    assert [r["index"] for r in read_records(tmp_path)] == [0, 1, 2, 3, 4]


def test_more_prompts_extend_a_folder(painter, tmp_path):
    draw(painter, jobs(PROMPTS[:2], seed=0), tmp_path, sampling=QUICK, batch_size=2)
    draw(painter, jobs(PROMPTS, seed=0), tmp_path, sampling=QUICK, batch_size=3)
    assert painter.drawn == [PROMPTS[:2], PROMPTS[:3], PROMPTS[3:]]
    painter.drawn.clear()
    draw(painter, jobs(PROMPTS, seed=0), tmp_path, sampling=QUICK)
    assert not painter.drawn


class Crowded(Painter):
    """Whose videos depend on all that share their batch, as the last bits of real ones do."""

    def __call__(self, prompts, *, seeds, **options):
        return super().__call__(prompts, seeds=[sum(seeds)] * len(seeds), **options)


def test_files_are_the_same_after_any_kill_on_any_number_of_ranks(tmp_path):
    work = jobs([f"prompt {i}" for i in range(11)], seed=0)
    options = {"sampling": QUICK, "batch_size": 3}
    draw(Crowded(), work, tmp_path / "one", **options)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.mp4")}
    for ranks, lost in ((2, ()), (3, (1, 7, 10)), (4, (0, 1, 2, 3))):
        folder = tmp_path / str(ranks)
        draw(Crowded(), work[:9], folder, **options)
        for index in lost:
            for path in folder.glob(f"{index:04d}*.mp4"):
                path.unlink()
        on_ranks(ranks, lambda place, to=folder: draw(Crowded(), work, to, place=place, **options))
        assert {path.name: path.read_bytes() for path in folder.glob("*.mp4")} == whole


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sampling": SamplingConfig(sampler="heun")}, "sampling"),
        ({"shape": SHAPE.__class__(5, 32, 32, 4.0)}, "shape"),
        ({"negative_prompt": "grey"}, "negative_prompt"),
        ({"suffix": ".gif"}, "format"),
        ({"work": jobs(PROMPTS, seed=9)}, "prompt or seed"),
        ({"work": jobs(PROMPTS[::-1], seed=0)}, "prompt or seed"),
        ({"weights": "other"}, "weights"),
        # Fewer prompts than the folder has: what is left over still is of other weights.
        ({"weights": "other", "work": []}, "weights"),
    ],
)  # fmt: skip
def test_samples_drawn_differently_are_not_mixed(change, told, painter, tmp_path):
    options = {"work": jobs(PROMPTS, seed=0), "sampling": QUICK}
    draw(painter, options.pop("work"), tmp_path, **options)
    before = names(tmp_path)
    painter.fingerprint = change.pop("weights", "painter")
    options = {"work": jobs(PROMPTS, seed=0), "sampling": QUICK, **change}
    with pytest.raises(UsageError, match=rf"drawn differently \({told}.*choose another folder"):
        draw(painter, options.pop("work"), tmp_path, **options)
    assert names(tmp_path) == before


def test_a_picture_that_is_drawn_first_and_its_video_have_noise_of_their_own(painter, tmp_path):
    asked = []

    def call(prompts, *, seeds, shape, given=None, **options):
        asked.append((shape.num_frames, list(seeds)))
        return Painter.__call__(painter, prompts, seeds=seeds, shape=shape, **options)

    pipeline = type("Asked", (Painter,), {"__call__": lambda self, *a, **k: call(*a, **k)})()
    draw(pipeline, jobs(PROMPTS[:2], seed=3), tmp_path, sampling=QUICK, picture_first=True)
    (still, first), (whole, second) = asked
    assert (still, whole, second) == (1, SHAPE.num_frames, [3, 4])
    assert len({*first, *second}) == 4


def test_another_picture_of_the_same_name_is_not_taken_for_the_one_that_was_given(tmp_path):
    picture = tmp_path / "a.png"
    write_image(picture, np.zeros((32, 32, 3), np.uint8))
    work = [Job(0, PROMPTS[0], 0, references=(Reference(str(picture)),))]
    pipeline, folder = build_pipeline(), tmp_path / "out"
    draw(pipeline, work, folder, sampling=QUICK)
    draw(pipeline, work, folder, sampling=QUICK)
    assert len(read_records(folder)) == 1
    write_image(picture, np.full((32, 32, 3), 255, np.uint8))
    with pytest.raises(UsageError, match="or given frames"):
        draw(pipeline, work, folder, sampling=QUICK)
    picture.unlink()
    with pytest.raises(DataError, match=r"a\.png' cannot be read"):
        draw(pipeline, work, folder, sampling=QUICK)


def test_the_words_of_a_line_name_its_file(painter, tmp_path):
    work = jobs(['A car. {"mask_strategy": "0"}', "|0|day|1|night", 'a {"b'], seed=0)
    work = [replace(job, told=("x",)) for job in work]
    records = draw(painter, work, tmp_path, sampling=QUICK)
    assert [r["file"] for r in records] == ["0000-a-car.mp4", "0001-day-night.mp4", "0002-a-b.mp4"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"caf\xe9", "save it as UTF-8"),
        ("a.jsonl", b'{"text": "a dog"}', "a .txt, one a line, or a .csv"),
        ("a.csv", b"path;text\nx;a dog\n", "Separate columns by commas"),
    ],
)
def test_files_that_hold_no_prompts_as_they_are_say_how_to_mend_them(name, content, told, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=told):
        read_prompts(tmp_path / name)


def test_a_folder_that_takes_no_files_is_found_out_before_anything_is_drawn(painter, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        draw(painter, jobs(["a dog"], seed=0), tmp_path / "file", sampling=QUICK)
    assert painter.drawn == []


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webm"])
def test_every_format_is_written(suffix, painter, tmp_path):
    (record,) = draw(painter, jobs(["a dog"], seed=0), tmp_path, sampling=QUICK, suffix=suffix)
    assert record["file"] == f"0000-a-dog{suffix}"
    assert (tmp_path / record["file"]).stat().st_size > 50


def test_a_sample_in_a_folder_does_not_depend_on_the_batch_size(tmp_path):
    pipeline = build_pipeline()
    frames = []
    for size in (1, 3):
        records = draw(
            pipeline, jobs(PROMPTS[:3], seed=0), tmp_path / str(size), sampling=QUICK,
            batch_size=size, suffix=".png",
        )  # fmt: skip
        frames.append([read_clip(tmp_path / str(size) / r["file"]).frames for r in records])
    for one, three in zip(*frames, strict=True):
        assert np.abs(one.astype(int) - three).max() <= 1  # as in test_pipeline.py


HOSTILE = [
    "../../etc/passwd",
    "/absolute/path",
    "a; rm -rf ~ #",
    "$(reboot) `reboot`",
    "con\u202egpj.exe",
    "emoji 🐙 and 中文",
    "quote ' and \" and \\",
    "a" * 4000,
    "-rf",
    ".hidden",
    "tab\tand\x00null",
    "<script>alert(1)</script>",
    "🐙",
    "line\u2028separator",
]


def test_hostile_prompts_get_harmless_names(painter, tmp_path):
    folder = tmp_path / "inside"
    records = draw(painter, jobs(HOSTILE, seed=0), folder, sampling=QUICK)
    assert names(tmp_path) == ["inside"]
    for index, (record, prompt) in enumerate(zip(records, HOSTILE, strict=True)):
        name = record["file"]
        assert name.startswith(f"{index:04d}")
        assert name.removesuffix(".mp4").replace("-", "").isalnum()
        assert name.isascii()
        assert len(name) < 60
        assert record["prompt"] == prompt
    assert [r["prompt"] for r in read_records(folder)] == HOSTILE


def test_prompts_come_one_a_line_or_from_a_column(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_bytes("\ufeffa dog\r\n\r\n  a cät  \nc\u2028d\n".encode())
    assert read_prompts(text) == ["a dog", "a cät", "c\u2028d"]
    table = tmp_path / "prompts.CSV"
    table.write_text(
        'id,text\n1,"a dog, barking"\n2,"two\nlines"\n3,\n4,"c\u2028d"\n', encoding="utf-8"
    )
    assert read_prompts(table) == ["a dog, barking", "two\nlines", "c\u2028d"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"\n \n", "holds no prompts"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
        ("a.csv", b"txet\na dog\n", "no column 'text'.* Did you mean 'txet'"),
        ("a.csv", b"", "no column 'text'"),
        ("a.csv", b"text\n" + b"x" * 200_000, "cannot be read"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(name, content, told, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=told):
        read_prompts(tmp_path / name)
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_every_repetition_has_a_seed_of_its_own():
    work = jobs(["a", "b"], seed=10, per_prompt=3)
    assert [(j.index, j.prompt, j.seed) for j in work] == [
        (0, "a", 10), (1, "a", 11), (2, "a", 12), (3, "b", 13), (4, "b", 14), (5, "b", 15),
    ]  # fmt: skip


def test_a_folder_without_samples_is_told(tmp_path):
    with pytest.raises(DataError, match="holds no samples"):
        read_records(tmp_path)
    (tmp_path / RECORD_NAME).write_text(json.dumps({})[:1])
    with pytest.raises(DataError, match="holds no samples"):
        read_records(tmp_path)


def test_progress_of_ranks_that_share_prompts_ends_at_all_of_them(tmp_path):
    told: list[tuple[int, int]] = []

    def run(place):
        progress = (lambda done, total: told.append((done, total))) if place.is_main else None
        draw(
            Painter(), jobs(PROMPTS, seed=0), tmp_path, sampling=QUICK, place=place,
            progress=progress,
        )  # fmt: skip

    on_ranks(2, run)
    assert told[-1] == (len(PROMPTS), len(PROMPTS))
