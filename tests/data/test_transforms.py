"""Fitting frames: size, range, which part is kept, and the way back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opensora.data.transforms import crop_region, fit, to_uint8

sides = st.integers(1, 60)


def noise(*shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_frames_of_the_right_size_survive_the_round_trip_exactly():
    frames = noise(5, 12, 20, 3)
    pixels = fit(frames, (12, 20))
    assert pixels.shape == (3, 5, 12, 20)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert np.array_equal(to_uint8(pixels), frames)
    assert torch.equal(pixels[0, 1], torch.from_numpy(frames[1, :, :, 0]) / 127.5 - 1)


def test_every_level_maps_into_minus_one_to_one_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    pixels = fit(levels, (16, 16))
    assert float(pixels.min()) == -1.0
    assert float(pixels.max()) == 1.0
    assert np.array_equal(to_uint8(pixels), levels)


def test_to_uint8_clips_rounds_and_takes_batches():
    values = torch.tensor([-3.0, -1.0, 0.0, 0.0039, 1.0, 3.0]).reshape(1, 1, 1, 1, 6)
    found = to_uint8(values.expand(2, 3, 1, 1, 6).to(torch.float64))
    assert found.shape == (2, 1, 1, 6, 3)
    # Zero lies half way between 127 and 128; rounding is to the even one.
    assert found[0, 0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


@settings(max_examples=60, deadline=None)
@given(sides, sides, sides, sides, st.floats(0, 1), st.floats(0, 1))
def test_the_kept_part_lies_inside_and_has_the_targets_proportions(h, w, th, tw, y, x):
    top, left, height, width = crop_region((h, w), (th, tw), (y, x))
    assert 0 <= top <= top + height <= h
    assert 0 <= left <= left + width <= w
    assert height == h or width == w
    # The side that is cut is right to half a pixel (or cannot be under one).
    if width == w:
        assert abs(height - w * th / tw) <= 0.5 or height == 1 or height == h
    else:
        assert abs(width - h * tw / th) <= 0.5 or width == 1
    frames = noise(2, h, w, 3)
    assert fit(frames, (th, tw), offset=(y, x)).shape == (3, 2, th, tw)


def test_the_offset_chooses_the_part_and_none_stretches():
    frames = np.zeros((1, 8, 24, 3), np.uint8)
    frames[:, :, 8:16] = 100
    frames[:, :, 16:] = 200
    for offset, level in (((0.5, 0.0), 0), ((0.5, 0.5), 100), ((0.5, 1.0), 200)):
        assert (to_uint8(fit(frames, (8, 8), offset=offset)) == level).all()
    whole = to_uint8(fit(frames, (8, 8), offset=None))
    assert whole[0, 0, 0, 0] < 10
    assert whole[0, 0, -1, 0] > 190


def test_nothing_is_mirrored_unless_asked():
    frames = noise(2, 6, 10, 3)
    assert np.array_equal(to_uint8(fit(frames, (6, 10), flip=True)), frames[:, :, ::-1])


def test_resampling_is_antialiased_bicubic_like_pillows():
    ramp = np.linspace(0, 255, 90)[None, :] * np.ones((60, 1))
    waves = 127 + 100 * np.sin(np.arange(90) / 3)[None, :] * np.sin(np.arange(60) / 4)[:, None]
    frame = np.stack([ramp, waves, waves.clip(100, 160)], axis=2).astype(np.uint8)
    for size in ((20, 30), (64, 96)):
        ours = to_uint8(fit(frame[None], size))[0].astype(int)
        pillow = Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC)
        # Both work in fixed point and may round a level apart, once in each direction.
        assert abs(ours - np.asarray(pillow).astype(int)).max() <= 2
    # A pattern finer than the grid becomes grey instead of moire.
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert abs(to_uint8(fit(stripes, (16, 16)))[..., 4:-4, :].astype(int) - 127).max() <= 2


@pytest.mark.parametrize("size", [(5, 7), (40, 24)])
def test_a_flat_picture_stays_flat(size):
    frames = np.full((2, 13, 17, 3), (10, 130, 250), np.uint8)
    assert (to_uint8(fit(frames, size)) == (10, 130, 250)).all()
