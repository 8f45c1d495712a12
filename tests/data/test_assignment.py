"""Assignment: every row is in one bucket or left out for one stated reason."""

import numpy as np
import pytest
from data_support import PATCH, assign, buckets, make_manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.data.assignment import BucketAssigner
from opensora.errors import DataError


def shapes_of(assignment) -> list[str]:
    return [
        "-" if index < 0 else assignment.buckets[index].shape
        for index in assignment.bucket_of_row.tolist()
    ]


def test_a_row_takes_the_largest_size_and_length_it_reaches(tmp_path):
    config = buckets({"64px": {5: [1, 2], 17: [1, 2]}, "128px": {17: [1, 2]}})
    manifest = make_manifest(
        tmp_path,
        6,
        height=[128, 128, 64, 64, 120, 64],
        width=[128, 128, 64, 64, 120, 128],
        num_frames=[17, 16, 17, 16, 17, 5],
    )
    found = shapes_of(assign(manifest, config)(0))
    assert found == ["17x128x128", "5x64x64", "17x64x64", "5x64x64", "17x128x128", "5x48x96"]


def test_the_nearest_proportions_are_taken(tmp_path):
    config = buckets({"256px": {17: [1, 1]}}, max_upscale=9)
    for ratio, shape in ((1.0, (256, 256)), (16 / 9, (192, 336)), (0.4, (384, 160))):
        manifest = make_manifest(tmp_path, 1, height=1000, width=round(1000 * ratio))
        assert shapes_of(assign(manifest, config)(0)) == [f"17x{shape[0]}x{shape[1]}"]


@pytest.mark.parametrize(
    ("fps", "num_frames", "wanted", "reaches"),
    [
        (8.0, 17, {}, True),
        (8.0, 16, {}, False),
        (24.0, 49, {"fps": 8}, True),  # frames 0, 3, ... 48
        (24.0, 48, {"fps": 8}, False),
        (24.0, 33, {"frame_interval": 2}, True),
        (24.0, 32, {"frame_interval": 2}, False),
        (23.976, 17, {"fps": 24}, True),
        (21.0, 60, {"fps": 24}, False),  # would repeat frames
    ],
)
def test_a_clip_is_long_enough_when_its_last_frame_exists(
    tmp_path, fps, num_frames, wanted, reaches
):
    manifest = make_manifest(tmp_path, 2, fps=[fps, 30.0], num_frames=[num_frames, 300])
    found = shapes_of(assign(manifest, buckets({"64px": {17: [1, 1]}}, **wanted))(0))
    assert (found[0] != "-") == reaches
    assert found[1] != "-"


def test_a_window_shortens_a_clip(tmp_path):
    config = buckets({"64px": {17: [1, 1]}})
    manifest = make_manifest(tmp_path, 3, num_frames=100, start=[0, 1, 1], end=[9, 3.2, 3.0])
    assert [shape != "-" for shape in shapes_of(assign(manifest, config)(0))] == [True, True, False]


def test_still_pictures_and_clips_do_not_mix(tmp_path):
    config = buckets({"64px": {1: [1, 4], 17: [1, 2]}})
    manifest = make_manifest(tmp_path, 3, num_frames=[1, 30, 3])
    assert shapes_of(assign(manifest, config)(0)) == ["1x64x64", "17x64x64", "-"]
    without = assign(manifest, buckets({"64px": {17: [1, 2]}}))(0)
    assert without.census.left_out == {
        "a still picture, and there is no bucket of 1 frame": 1,
        "shorter than every length": 1,
    }


def test_the_census_names_one_reason_for_each_row(tmp_path):
    manifest = make_manifest(
        tmp_path,
        8,
        height=[64, 64, 30, 64, 64, 64, 64, 64],
        fps=[8, 8, 8, 8, 8, 6, 8, 8],
        num_frames=[24, 24, 24, 3, 24, 24, 24, 24],
    )
    manifest.scores["score_aes"] = np.array([5, 3, 5, 5, np.nan, 5, 6.5, 5], np.float32)
    config = buckets({"64px": {17: [1, 2]}}, fps=8, scores={"score_aes": [4.5, 6]})
    census = assign(manifest, config)(0).census
    assert census.kept == {"17x64x64": 2}
    assert census.left_out == {
        "score_aes not in [4.5, 6.0]": 3,
        "slower than 8 frames per second": 1,
        "smaller than every resolution": 1,
        "shorter than every length": 1,
    }
    assert census.examples["score_aes not in [4.5, 6.0]"] == [1, 4, 6]
    assert str(census).splitlines()[0] == "2 of 8 rows are used"
    assert "left out, smaller than every resolution: 1 (rows 2)" in str(census)


def test_an_empty_plan_refuses_to_start_and_says_why(tmp_path):
    manifest = make_manifest(tmp_path, 7, num_frames=4)
    with pytest.raises(DataError, match="nothing to train on") as caught:
        assign(manifest, buckets({"64px": {17: [1, 2]}}))
    assert "shorter than every length: 7 (rows 0, 1, 2, 3, 4, ...)" in str(caught.value)
    manifest.scores["score_aes"] = np.zeros(7, np.float32)
    with pytest.raises(DataError, match=r"no column 'score_ae' to filter by\. Did you mean"):
        assign(manifest, buckets({"64px": {1: [1, 2]}}, scores={"score_ae": [1, 2]}))


def test_keep_probabilities_send_rows_to_lower_resolutions_and_shorter_lengths(tmp_path):
    manifest = make_manifest(tmp_path, 20_000, height=128, width=128, num_frames=40)
    config = buckets(
        {"128px": {33: [[0.5, 0.4], 1], 17: [0.25, 1]}, "64px": {17: [0.5, 1]}},
        aspect_ratios=["1:1"],
    )
    counts = assign(manifest, config)(0).census.kept
    expected = {
        "33x128x128": 0.4 * 0.5,
        "17x128x128": 0.6 * 0.25,
        "17x64x64": (0.4 * 0.5 + 0.6 * 0.75) * 0.5,
    }
    for shape, part in expected.items():
        # Five standard deviations of a binomial count.
        tolerance = 5 * (part * (1 - part) * 20_000) ** 0.5
        assert abs(counts[shape] - part * 20_000) < tolerance, shape


def test_draws_depend_on_seed_epoch_and_row_alone(tmp_path):
    config = buckets({"64px": {17: [0.5, 2]}})
    large, small = make_manifest(tmp_path, 400), make_manifest(tmp_path, 100)
    first = assign(large, config)
    epoch3 = first(3).bucket_of_row
    assert not np.array_equal(first(2).bucket_of_row, epoch3)
    assert np.array_equal(first(3).bucket_of_row, epoch3)
    assert np.array_equal(assign(small, config)(3).bucket_of_row, epoch3[:100])
    assert not np.array_equal(assign(large, config, seed=1)(3).bucket_of_row, epoch3)
    assert not first.is_constant
    assert assign(large, buckets({"64px": {17: [1, 2]}})).is_constant


def test_the_identity_depends_on_everything_that_decides(tmp_path):
    manifest, config = make_manifest(tmp_path, 5), buckets({"64px": {17: [1, 2]}})
    base = assign(manifest, config).identity
    assert assign(make_manifest(tmp_path, 5), config).identity == base
    assert assign(make_manifest(tmp_path, 6), config).identity != base
    assert assign(manifest, buckets({"64px": {17: [1, 3]}})).identity != base
    assert assign(manifest, config, seed=1).identity != base
    other = BucketAssigner(manifest, config, stride=(4, 4, 4), patch=PATCH, seed=0)
    assert other.identity != base


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_census_always_adds_up(tmp_path_factory, data):
    num_rows = data.draw(st.integers(1, 30))
    column = lambda values: data.draw(st.lists(values, min_size=num_rows, max_size=num_rows))  # noqa: E731
    manifest = make_manifest(
        tmp_path_factory.getbasetemp(),
        num_rows,
        num_frames=column(st.sampled_from([1, 2, 5, 17, 40])),
        height=column(st.integers(1, 200)),
        width=column(st.integers(1, 200)),
        fps=column(st.sampled_from([6.0, 8.0, 24.0])),
    )
    keep = st.sampled_from([0.0, 0.5, 1.0])
    config = buckets(
        {
            "64px": {1: [data.draw(keep), 2], 5: [[data.draw(keep), data.draw(keep)], 2]},
            "32px": {17: [data.draw(keep), 3]},
        },
        fps=data.draw(st.sampled_from([None, 8.0])),
    )
    try:
        found = assign(manifest, config)(0)
    except DataError:
        return
    census = found.census
    assert sum(census.kept.values()) + sum(census.left_out.values()) == census.num_rows == num_rows
    assert sum(census.kept.values()) == found.counts.sum() == (found.bucket_of_row >= 0).sum()
    members = [found.rows_of(bucket) for bucket in range(len(found.buckets))]
    assert sorted(np.concatenate(members)) == np.flatnonzero(found.bucket_of_row >= 0).tolist()
    for bucket, rows in enumerate(members):
        assert (found.bucket_of_row[rows] == bucket).all()
        assert (np.diff(rows) > 0).all()
