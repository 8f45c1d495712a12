"""Standardisation over a batch: its statistics and its gradient. Two ranks: test_ranks.py."""

import torch
from torch.testing import assert_close

from opensora.train.standardise import FLOOR, standardise, sum_over_ranks


def test_channels_have_mean_zero_and_variance_one():
    torch.manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 30.0]).view(1, 3, 1, 1, 1)
    latents = torch.randn(4, 3, 2, 5, 5) * scale + 7
    found, mean, std = standardise(latents, shared=True)
    dims = (0, 2, 3, 4)
    assert_close(mean, latents.mean(dims))
    assert_close(std, latents.std(dims) + FLOOR)
    assert_close(found, (latents - mean.view(1, 3, 1, 1, 1)) / std.view(1, 3, 1, 1, 1))


def test_the_gradient_goes_through_the_statistics():
    torch.manual_seed(0)
    latents = torch.randn(3, 2, 2, 2, 2, requires_grad=True)
    weights = torch.randn(3, 2, 2, 2, 2)
    found, *_ = standardise(latents, shared=False)
    (mine,) = torch.autograd.grad((found * weights).sum(), latents)
    mean = latents.mean((0, 2, 3, 4), keepdim=True)
    std = latents.std((0, 2, 3, 4), keepdim=True) + FLOOR
    (theirs,) = torch.autograd.grad(((latents - mean) / std * weights).sum(), latents)
    assert_close(mine, theirs)
    # Growing or shifting all latents of a channel changes nothing but the floor's part.
    assert_close((mine * latents).sum((0, 2, 3, 4)), torch.zeros(2), atol=1e-3, rtol=0)
    assert_close(mine.sum((0, 2, 3, 4)), torch.zeros(2), atol=1e-5, rtol=0)


def test_a_dead_channel_stays_finite():
    latents = torch.zeros(2, 1, 1, 2, 2)
    found, _, std = standardise(latents, shared=True)
    assert torch.equal(found, torch.zeros_like(found))
    assert_close(std, torch.tensor([FLOOR]))


def test_half_precision_is_measured_in_float32():
    torch.manual_seed(0)
    latents = (torch.randn(4, 1, 8, 8, 8) + 100).bfloat16()
    found, mean, std = standardise(latents, shared=True)
    assert found.dtype == mean.dtype == std.dtype == torch.float32
    assert_close(std, latents.float().std().view(1) + FLOOR)


def test_alone_a_sum_over_ranks_is_the_tensor_itself():
    values = torch.ones(3)
    assert sum_over_ranks(values) is values
