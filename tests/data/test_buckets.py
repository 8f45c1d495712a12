"""Buckets: names to areas to sizes, and configs in Open-Sora's form."""

import math

import pytest
from data_support import PATCH, STRIDE, buckets
from hypothesis import given
from hypothesis import strategies as st

from opensora.data.buckets import (
    ASPECT_RATIOS,
    BucketRule,
    frame_sizes,
    levels,
    num_pixels,
)
from opensora.errors import UsageError


def test_resolution_names_stand_for_areas():
    assert num_pixels("256px") == num_pixels("256") == 65536
    assert num_pixels("720p") == 720 * 1280
    assert num_pixels("144p") == 144 * 256
    # Open-Sora tabulates 240 x 426 and 480 x 854; the formula has no odd halves to round.
    assert num_pixels("240p") == pytest.approx(240 * 426, rel=2e-3)
    for name in ("256x256", "px", "0px", "-1p", "256 px", "1000000p"):
        with pytest.raises(ValueError, match="is none of NNNp"):
            num_pixels(name)


def test_open_soras_bucket_config_is_read_as_it_stands():
    found = buckets({"240p": {1: [0.3, 20], 17: [[1.0, 0.33], 8]}, "256": {17: {"batch_size": 2}}})
    assert found.resolutions["240p"][1] == BucketRule(keep=0.3, batch_size=20)
    assert found.resolutions["240p"][17] == BucketRule(keep=1.0, length_keep=0.33, batch_size=8)
    assert found.resolutions["256"][17] == BucketRule(keep=1.0, batch_size=2)
    budget = buckets({"256px": {17: 0.5}}, token_budget=10_000)
    assert budget.resolutions["256px"][17] == BucketRule(keep=0.5)


@pytest.mark.parametrize(
    ("resolutions", "rest", "message"),
    [
        ({}, {}, "resolutions is empty"),
        ({"256px": {}}, {}, "resolutions is empty"),
        ({"big": {17: [1, 1]}}, {}, "'big' is none of NNNp"),
        ({"256px": {0: [1, 1]}}, {}, "256px.0: a length is 1 frame or more"),
        ({"256px": {17: 1.0}}, {}, "256px.17 has no batch_size, and there is no token_budget"),
        ({"256px": {17: [1, 2]}}, {"token_budget": 9999}, "beside the token_budget"),
        ({"256px": {17: [1.5, 2]}}, {}, "less than or equal to 1"),
        ({"256px": {17: [1, 0]}}, {}, "greater than 0"),
        ({"256px": {17: [1, 1]}}, {"fps": 8, "frame_interval": 2}, "exclude each other"),
        ({"256px": {17: [1, 1]}}, {"aspect_ratios": ["1.78"]}, "not width:height"),
        ({"256px": {17: [1, 1]}}, {"aspect_ratios": ["0:1"]}, "not width:height"),
        ({"256px": {17: [1, 1]}}, {"fbs": 8}, "Did you mean 'fps'"),
    ],
)
def test_impossible_configs_are_refused_with_the_place(resolutions, rest, message):
    with pytest.raises(UsageError) as caught:
        buckets(resolutions, **rest)
    assert message in str(caught.value)


@given(st.integers(32, 1024), st.sampled_from([8, 16, 32]))
def test_sizes_are_multiples_near_the_area_and_the_ratio(side, multiple):
    sizes = frame_sizes(side * side, ASPECT_RATIOS, (multiple, multiple))
    assert len(set(sizes)) == len(sizes)
    ratios = [width / height for height, width in sizes]
    assert ratios == sorted(ratios)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert min(height, width) >= multiple
    for ratio in ASPECT_RATIOS:
        wide, high = map(float, ratio.split(":"))
        height, width = side * math.sqrt(high / wide), side * math.sqrt(wide / high)
        assert any(
            (abs(height - h) <= multiple / 2 or h == multiple)
            and (abs(width - w) <= multiple / 2 or w == multiple)
            for h, w in sizes
        )


def test_a_square_resolution_contains_its_square():
    (level,) = levels(buckets({"64px": {17: [1, 4]}}), stride=STRIDE, patch=PATCH)
    assert (64, 64) in level.sizes
    (row,) = level.buckets
    square = row[level.sizes.index((64, 64))]
    assert square == ("64px", 17, 64, 64, 4, 5 * 4 * 4)
    assert square.shape == "17x64x64"


def test_levels_and_lengths_come_largest_first():
    found = levels(
        buckets({"64px": {1: [1, 9], 17: [1, 4]}, "144p": {33: [1, 2], 5: [1, 3]}}),
        stride=STRIDE,
        patch=PATCH,
    )
    assert [level.resolution for level in found] == ["144p", "64px"]
    assert [num_frames for num_frames, _ in found[0].lengths] == [33, 5]
    assert all(bucket.num_frames == 5 for bucket in found[0].buckets[1])


def test_a_token_budget_sets_every_batch_size():
    found = levels(
        buckets({"64px": {1: 1, 17: 1}, "128px": {17: 1}}, token_budget=640),
        stride=STRIDE,
        patch=PATCH,
    )
    for level in found:
        for bucket in (b for row in level.buckets for b in row):
            assert bucket.batch_size == 640 // bucket.num_tokens >= 1
    with pytest.raises(UsageError, match=r"128px\.17: one clip has \d+ tokens, above token_budget"):
        levels(buckets({"128px": {17: 1}}, token_budget=100), stride=STRIDE, patch=PATCH)


def test_a_length_that_does_not_suit_the_vae_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"16 frames do not suit .* 1 \+ k \* 4 frames; use 17"):
        levels(buckets({"64px": {16: [1, 4]}}), stride=STRIDE, patch=PATCH)
    assert levels(buckets({"64px": {16: [1, 4]}}), stride=(1, 8, 8), patch=PATCH)


def test_a_temporal_patch_rounds_tokens_up():
    (level,) = levels(
        buckets({"64px": {17: [1, 4]}}, aspect_ratios=["1:1"]), stride=STRIDE, patch=(2, 2, 2)
    )
    assert level.buckets[0][0].num_tokens == 3 * 16
