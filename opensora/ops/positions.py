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


def rotary_phases(positions: Tensor, dims: tuple[int, ...], *, theta: float = 10_000.0) -> Tensor:
    """The rotary code (Su et al. 2021) over one or several axes, as points of the unit circle.

    Args:
        positions: float (L, A), a token's place on each axis.
        dims: even number of a head's features that turn with each axis; features beyond their
            sum do not turn.

    Returns:
        float32 (L, sum of dims / 2, 2), cosine and sine for each pair of features (2i, 2i + 1).
    """
    parts = []
    for axis, dim in enumerate(dims):
        exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
        parts.append(positions[:, axis].float()[:, None] * theta**-exponents)
    angles = torch.cat(parts, dim=-1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, phases: Tensor) -> Tensor:
    """Turn pairs of features of x (B, L, K, d) by their positions' phases; norms stay.

    Computed in float32 or wider; the result has x's dtype.
    """
    turning = 2 * phases.shape[-2]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    turned = turn(wide[..., :turning].unflatten(-1, (-1, 2)), phases[:, None]).flatten(-2)
    if turning < x.shape[-1]:
        turned = torch.cat([turned, wide[..., turning:]], dim=-1)
    return turned.to(x.dtype)


def turn(pairs: Tensor, phases: Tensor) -> Tensor:
    """The product of two tensors (..., 2) as complex numbers: one pass in eager mode, and plain
    arithmetic for the compiler, which does not fuse complex numbers."""
    if not torch.compiler.is_compiling():
        product = torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(phases)
        return torch.view_as_real(product)
    (a, b), (c, d) = pairs.unbind(-1), phases.unbind(-1)
    return torch.stack([a * c - b * d, a * d + b * c], dim=-1)
