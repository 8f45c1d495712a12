"""PSNR, SSIM and flicker against closed forms, loops, and figures of scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opensora.evaluate.similarity import flicker_added, psnr, ssim, unit


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    chance = np.random.default_rng(0)
    first = chance.random((2, 3, 24, 31))
    second = np.clip(first + 0.2 * chance.standard_normal(first.shape), 0, 1)
    second[1] = first[1] * 0.5 + 0.3
    return torch.from_numpy(first), torch.from_numpy(second)


def test_psnr_is_that_of_the_mean_squared_error_and_stops_at_100_db():
    first = torch.zeros(3, 3, 4, 4)
    second = first.clone()
    second[1] += 0.1
    second[2, 0] += 0.1  # one channel of three
    expected = [100.0, 20.0, 20 + 10 * np.log10(3)]
    assert psnr(first, second).tolist() == pytest.approx(expected, abs=1e-5)


def test_ssim_is_scikit_images():
    """structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=1), mean over the channels, version 0.26."""
    assert ssim(*pair()).tolist() == pytest.approx([0.8331613376706648, 0.7966186579982629])


def test_ssim_is_its_formula_in_loops():
    first, second = (x[0, 0, :13, :14].numpy() for x in pair())
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    found = []
    for top in range(3):
        for left in range(4):
            x, y = (p[top : top + 11, left : left + 11] for p in (first, second))
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            cov = (weights * (x - mx) * (y - my)).sum()
            index = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
            found.append(index / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    tensors = [torch.from_numpy(p)[None, None] for p in (first, second)]
    assert ssim(*tensors).item() == pytest.approx(np.mean(found), abs=1e-12)


def test_ssim_is_one_for_the_same_and_refuses_what_is_smaller_than_its_window():
    first, _ = pair()
    assert ssim(first, first).tolist() == pytest.approx([1, 1])
    with pytest.raises(ValueError, match="11 or more, found 10x31"):
        ssim(first[:, :, :10], first[:, :, :10])


def test_flicker_sees_what_changes_from_frame_to_frame_only():
    original = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert flicker_added(original + 0.2, original) == pytest.approx(0, abs=1e-4)
    blinking = original + torch.tensor([0.0, 0.1, 0.0, 0.1]).view(4, 1, 1, 1)
    assert flicker_added(blinking, original) == pytest.approx(25.5, rel=1e-4)
    still = original[:1].expand(4, -1, -1, -1)
    expected = 255 * original.diff(dim=0).abs().mean().item()  # motion that is lost counts too
    assert flicker_added(still, original) == pytest.approx(expected, rel=1e-4)


def test_pixels_go_from_0_to_1():
    frames = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3)
    assert unit(frames).flatten().tolist() == [0, 1, 0.2]
