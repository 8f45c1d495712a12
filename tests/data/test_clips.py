"""Clips: what is cut out of a file, what happens to unreadable ones, and loading in order."""

import csv
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from data_support import FakeRead, assign, buckets, make_manifest, part_of, write_clip
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.data import loading
from opensora.data.clips import ClipDataset, ClipReader, ClipsConfig, Quarantine
from opensora.data.loading import batches
from opensora.data.plan import Plan
from opensora.data.transforms import to_uint8
from opensora.errors import DataError, UsageError
from opensora.types import Clip

CONFIG = buckets({"64px": {17: [1, 4]}}, aspect_ratios=["1:1"], fps=8)


def pipeline(folder, num_rows, *, read, seed=0, quarantine=None, config=CONFIG, **options):
    manifest = make_manifest(folder, num_rows, num_frames=40)
    options.setdefault("max_bad_fraction", 1.0)
    reader = ClipReader(manifest, config, ClipsConfig(**options), seed=seed, read=read)
    quarantine = quarantine or Quarantine(num_rows, options["max_bad_fraction"])
    return ClipDataset(reader, quarantine), Plan(assign(manifest, config, seed=seed), seed=seed)


def equal(first, second) -> bool:
    return (
        torch.equal(first.pixels, second.pixels)
        and first.texts == second.texts
        and torch.equal(first.sample_ids, second.sample_ids)
        and torch.equal(first.fps, second.fps)
        and first.replaced == second.replaced
    )


def children() -> int:
    return len(multiprocessing.active_children())


def test_a_batch_holds_what_the_plan_says(tmp_path):
    dataset, plan = pipeline(tmp_path, 30, read=FakeRead())
    batch = dataset[plan.batch(5)]
    rows = plan.batch(5).rows.tolist()
    assert batch.pixels.shape == (4, 3, 17, 64, 64)
    assert batch.pixels.dtype == torch.float32
    assert batch.sample_ids.tolist() == rows
    assert batch.sample_ids.dtype == torch.int64
    assert batch.texts == tuple(f"clip {row}" for row in rows)
    assert batch.fps.tolist() == [8.0] * 4
    assert batch.fps.dtype == torch.float32
    assert batch.replaced == 0
    assert to_uint8(batch.pixels)[:, 0, 0, 0, 0].tolist() == rows


def test_starts_fill_the_window_and_depend_on_seed_row_and_step(tmp_path):
    read = FakeRead()
    dataset, plan = pipeline(tmp_path, 8, read=read)
    for step in range(100):
        dataset[plan.batch(step)]
    starts = np.array([start for _, start, _ in read.calls])
    # 40 frames at 8 fps hold a clip of 17 that begins at 0 to 23 frames; draws fill that evenly.
    assert starts.min() >= 0
    assert starts.max() <= 23 / 8
    assert abs(starts.mean() - 23 / 16) < 5 * (23 / 8) / 12**0.5 / 400**0.5
    again = FakeRead()
    pipeline(tmp_path, 8, read=again)[0][plan.batch(3)]
    assert again.calls == read.calls[12:16]
    other = FakeRead()
    pipeline(tmp_path, 8, read=other, seed=1)[0][plan.batch(3)]
    assert [row for row, *_ in other.calls] == [row for row, *_ in again.calls]
    assert other.calls != again.calls


def test_a_window_shifts_the_start_and_first_begins_with_it(tmp_path):
    manifest = make_manifest(tmp_path, 1, num_frames=80, start=2.0, end=6.0)
    reader = ClipReader(manifest, CONFIG, ClipsConfig(start="first"), seed=0, read=FakeRead())
    assert reader.start(0, 17, 0.0) == 2.0
    assert reader.start(0, 17, 1.0) == pytest.approx(6.0 - 1 / 8 - 16 / 8)


def test_frame_intervals_and_own_rates_become_the_clips_rate(tmp_path):
    manifest = make_manifest(tmp_path, 2, fps=[24.0, 30.0], num_frames=90)
    for config, rates in (
        (buckets({"64px": {17: [1, 1]}}), [24, 30]),
        (buckets({"64px": {17: [1, 1]}}, frame_interval=3), [8, 10]),
        (buckets({"64px": {17: [1, 1]}}, fps=12), [12, 12]),
    ):
        reader = ClipReader(manifest, config, ClipsConfig(), seed=0, read=FakeRead())
        assert [reader.fps(row) for row in range(2)] == rates


def test_real_files_are_cut_at_the_drawn_time(videos):
    manifest = make_manifest(videos, 6)
    config = buckets({"64px": {9: [1, 6]}}, aspect_ratios=["1:1"], fps=4)
    reader = ClipReader(manifest, config, ClipsConfig(), seed=0)
    plan = Plan(assign(manifest, config), seed=0)
    batch = ClipDataset(reader, Quarantine(6, 0.0))[plan.batch(0)]
    frames = to_uint8(batch.pixels).astype(int)
    for clip, row in zip(frames, batch.sample_ids.tolist(), strict=True):
        # The untouched right half shows the row's red; h264 moves it by some levels.
        assert abs(np.median(clip[:, :, 50:, 0]) - 40 * row) < 12
        # White columns grow by 2 a frame at 8 fps, so by 4 a frame at 4 fps.
        white = (clip[:, 32, :, 1] > 160).sum(axis=1)
        assert np.abs(np.diff(white) - 4).max() <= 1


def test_crop_and_flip_follow_the_config(tmp_path):
    class Half(FakeRead):
        def __call__(self, path, *, num_frames, **rest):
            frames = np.zeros((num_frames, 64, 128, 3), np.uint8)
            frames[:, :, :32] = 255
            return Clip(frames, np.arange(num_frames) / 8, 8, "")

    def left_part(**options) -> list[float]:
        dataset, plan = pipeline(tmp_path, 4, read=Half(), **options)
        pixels = torch.cat([dataset[plan.batch(step)].pixels for step in range(8)])
        return [round(float((clip[0, 0, 32] > 0).float().mean()), 2) for clip in pixels]

    assert set(left_part()) == {0.0}  # the centre of the picture is dark
    assert set(left_part(crop="none")) == {0.25}
    assert len(set(left_part(crop="random"))) > 5
    dataset, plan = pipeline(tmp_path, 4, read=Half(), crop="none", flip=0.5)
    first = torch.cat([dataset[plan.batch(step)].pixels[:, 0, 0, 32, 0] for step in range(16)])
    mirrored = int((first < 0).sum())
    assert 64 * 0.5 - 5 * 4 < mirrored < 64 * 0.5 + 5 * 4


def test_an_unreadable_clip_is_named_counted_and_always_replaced_alike(tmp_path, caplog):
    bad = frozenset({3, 11})
    results = []
    for world_size in (1, 2, 4):
        path = tmp_path / f"quarantine-{world_size}.csv"
        got = []
        ranks = [
            pipeline(tmp_path, 30, read=FakeRead(bad), quarantine=Quarantine(30, 1.0, path))
            for _ in range(world_size)
        ]
        for step in range(16):
            parts = [
                dataset[plan.local(step, part_of(rank, world_size))]
                for rank, (dataset, plan) in enumerate(ranks)
            ]
            got.append(torch.cat([part.sample_ids for part in parts]).tolist())
            wanted = ranks[0][1].batch(step).rows.tolist()
            assert sum(part.replaced for part in parts) == sum(row in bad for row in wanted)
            assert all(row == w for row, w in zip(got[-1], wanted, strict=True) if w not in bad)
        results.append(got)
        with open(path, newline="", encoding="utf-8") as file:
            told = {int(row): reason for row, _, reason in csv.reader(file)}
        assert set(told) == bad
        assert "0003.mp4' is bad" in told[3]
    assert results[0] == results[1] == results[2]
    assert not bad & {row for rows in results[0] for row in rows}
    assert "row 3 cannot be used" in caplog.text


def test_too_many_unreadable_rows_end_the_run(tmp_path):
    read = FakeRead(frozenset(range(5)))
    dataset, plan = pipeline(tmp_path, 40, read=read, max_bad_fraction=0.1)
    told = r"5 of 40 rows are unreadable, more than max_bad_fraction=0.1 allows"
    with pytest.raises(DataError, match=told):
        list(batches(dataset, plan, num_steps=40))
    read.calls.clear()
    dataset, plan = pipeline(tmp_path, 40, read=read, max_bad_fraction=0.125)
    assert len(list(batches(dataset, plan, num_steps=40))) == 40
    tried = [row for row, *_ in read.calls]
    assert [tried.count(row) for row in range(5)] == [1] * 5  # once known, never opened again


def test_a_bucket_without_one_readable_clip_is_an_error_not_a_loop(tmp_path):
    dataset, plan = pipeline(tmp_path, 4, read=FakeRead(frozenset(range(4))))
    with pytest.raises(DataError, match=r"neither row \d nor its 8 stand-ins"):
        dataset[plan.batch(0)]


def test_missing_files_are_quarantined_too(tmp_path):
    write_clip(tmp_path / "0000.mp4")
    manifest = make_manifest(tmp_path, 2, num_frames=24)
    reader = ClipReader(manifest, CONFIG, ClipsConfig(), seed=0)
    plan = Plan(assign(manifest, CONFIG), seed=0)
    batch = ClipDataset(reader, Quarantine(2, 0.5))[plan.batch(0)]
    assert batch.sample_ids.tolist() == [0, 0, 0, 0]
    assert batch.replaced == 2


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_change_neither_content_nor_order_from_any_step(tmp_path, context):
    read = FakeRead(frozenset({3}))
    dataset, plan = pipeline(tmp_path, 30, read=read)
    reference = list(batches(dataset, plan, num_steps=12))
    for first in (0, 5) if context == "fork" else (7,):
        dataset, plan = pipeline(tmp_path, 30, read=read)
        got = list(
            batches(
                dataset,
                plan,
                first,
                num_steps=12 - first,
                num_workers=2 if context == "fork" else 1,
                multiprocessing_context=context,
            )
        )
        assert len(got) == 12 - first
        assert all(map(equal, got, reference[first:]))
    assert children() == 0


@settings(max_examples=6, deadline=None)
@given(
    world_size=st.sampled_from([1, 2, 4]),
    num_workers=st.sampled_from([0, 2]),
    first=st.integers(0, 20),
)
def test_ranks_and_workers_together_read_the_global_batches(
    tmp_path_factory, world_size, num_workers, first
):
    folder = tmp_path_factory.getbasetemp()
    dataset, plan = pipeline(folder, 22, read=FakeRead())
    whole = [dataset[plan.batch(step)] for step in range(first, first + 3)]
    ranks = [
        list(
            batches(
                dataset,
                plan,
                first,
                part=part_of(rank, world_size),
                num_steps=3,
                num_workers=num_workers,
            )
        )
        for rank in range(world_size)
    ]
    for step, expected in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([part.pixels for part in parts]), expected.pixels)
        assert torch.equal(torch.cat([part.sample_ids for part in parts]), expected.sample_ids)
        assert sum((part.texts for part in parts), ()) == expected.texts
    assert children() == 0


@pytest.mark.parametrize("late", [0.0, 0.5])
def test_a_dropped_iterator_leaves_no_process_and_signals_leave_workers_alone(
    late, tmp_path, monkeypatch
):
    """Also a worker that is only beginning when the signals come."""
    start = loading._start_worker
    monkeypatch.setattr(loading, "_start_worker", lambda n: (time.sleep(late * n), start(n)))
    dataset, plan = pipeline(tmp_path, 30, read=FakeRead())
    stream = batches(dataset, plan, num_workers=2)
    first = next(stream)
    assert children() == 2
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    time.sleep(0.1)
    got = [next(stream) for _ in range(8)]  # past what was read ahead
    assert equal(first, dataset[plan.batch(0)])
    assert equal(got[-1], dataset[plan.batch(8)])
    stream.close()
    assert children() == 0


def test_an_error_in_a_worker_keeps_its_kind_and_its_one_line(tmp_path):
    read = FakeRead(frozenset(range(30)))
    dataset, plan = pipeline(tmp_path, 30, read=read, max_bad_fraction=0.0)
    with pytest.raises(DataError) as caught:
        list(batches(dataset, plan, num_steps=2, num_workers=2))
    assert "rows are unreadable" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert children() == 0


def test_what_one_worker_found_unreadable_the_others_know(tmp_path):
    path = tmp_path / "quarantine.csv"
    quarantine = Quarantine(30, 1.0, path)
    dataset, plan = pipeline(tmp_path, 30, read=FakeRead(frozenset({3})), quarantine=quarantine)
    total = sum(batch.replaced for batch in batches(dataset, plan, num_steps=30, num_workers=2))
    assert total == 4
    assert quarantine.count == 1
    assert 3 in quarantine


def test_impossible_requests_are_refused_at_once(tmp_path):
    dataset, plan = pipeline(tmp_path, 30, read=FakeRead())
    for wrong in ({"first_step": -1}, {"num_workers": -1}, {"part": lambda bucket: (0, 5)}):
        with pytest.raises(UsageError):
            batches(dataset, plan, **wrong)
