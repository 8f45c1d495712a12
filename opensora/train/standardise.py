"""Zero mean and unit variance per channel, over a batch that may be spread over ranks.

Like synchronised batch normalisation: the statistics, and the gradient through them, are those of
the whole batch, so a run does not depend on how many ranks share it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

FLOOR = 1e-4
"""Added to standard deviations, so that a dead channel stays finite."""


class _SumOverRanks(torch.autograd.Function):
    """Sum of every rank's tensor; its gradient is the sum of every rank's gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return _SumOverRanks.apply(gradient)  # type: ignore[return-value]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over ranks, differentiable; `values` themselves where this process is alone."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return values
    return _SumOverRanks.apply(values)  # type: ignore[return-value]


def standardise(latents: Tensor, *, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Latents with zero mean and unit variance per channel, and the statistics that did it.

    Args:
        latents: float (B, C, T, H, W), this rank's part of the batch.
        shared: over the batches of all ranks; every rank then has to call this equally often.

    Returns:
        float32 (B, C, T, H, W), and the mean and standard deviation, float32 (C,).
    """
    x, dims, shape = latents.float(), (0, 2, 3, 4), (1, -1, 1, 1, 1)
    over_ranks = sum_over_ranks if shared else lambda values: values
    size = x.new_tensor([x.numel() / x.shape[1]])
    *sums, count = over_ranks(torch.cat([x.sum(dims), size])).split([x.shape[1], 1])
    mean = sums[0] / count  # C
    deviation = x - mean.view(shape)
    variance = over_ranks(deviation.square().sum(dims)) / (count - 1)  # C
    std = variance.sqrt() + FLOOR
    return deviation / std.view(shape), mean, std
