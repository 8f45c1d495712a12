"""Where a token is: fixed sinusoids for space, rotary phases for time.

Both take positions as tensors, so that one model serves any resolution, length and offset.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoid(positions: Tensor, dim: int, *, max_period: float = 10_000.0) -> Tensor:
    """Sines and cosines of geometrically spaced frequencies (Vaswani et al. 2017, section 3.5).

    Args:
        positions: float (...), any real numbers.
        dim: even width of the code.
        max_period: the longest wavelength is 2 pi times this.

    Returns:
        float32 (..., dim): cosines first, then sines, as DiT's timestep embedding has them.
    """
    if dim % 2:
        raise ValueError(f"sinusoid width {dim} must be even")
    half = dim // 2
    exponents = torch.arange(half, device=positions.device, dtype=torch.float32) / half
    frequencies = max_period**-exponents
    angles = positions.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_2d(rows: Tensor, columns: Tensor, dim: int, *, max_period: float = 10_000.0) -> Tensor:
    """A fixed code for every cell of a grid: half of the width for rows, half for columns.

    Args:
        rows: float (H,), the vertical positions.
        columns: float (W,), the horizontal positions.
        dim: width, divisible by 4.

    Returns:
        float32 (H * W, dim), row by row.
    """
    if dim % 4:
        raise ValueError(f"2-D sinusoid width {dim} must be divisible by 4")
    height, width = len(rows), len(columns)
    by_row = sinusoid(rows, dim // 2, max_period=max_period)[:, None].expand(height, width, -1)
    by_column = sinusoid(columns, dim // 2, max_period=max_period)[None].expand(height, width, -1)
    return torch.cat([by_column, by_row], dim=-1).reshape(height * width, dim)


def rotary_angles(
    positions: Tensor, dims: tuple[int, ...], *, theta: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary code (Su et al. 2021) over one or several axes.

    Args:
        positions: float (L, A), a token's place on each axis.
        dims: even number of a head's features that turn with each axis; features beyond their
            sum do not turn.

    Returns:
        Two float32 tensors (L, sum of dims), each frequency repeated for its pair (2i, 2i + 1).
    """
    parts = []
    for axis, dim in enumerate(dims):
        exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
        parts.append(positions[:, axis].float()[:, None] * theta**-exponents)
    angles = torch.cat(parts, dim=-1).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs of features of x (B, L, K, d) by their positions' angles; norms stay."""
    cosine, sine = (a[None, :, None, :].to(x.dtype) for a in angles)
    still = x[..., cosine.shape[-1] :]
    x = x[..., : cosine.shape[-1]]
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    x = x * cosine + turned * sine
    return torch.cat([x, still], dim=-1) if still.shape[-1] else x
