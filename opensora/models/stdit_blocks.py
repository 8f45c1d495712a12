"""The blocks of STDiT: attention within frames or across them, to the text, and an MLP.

Tokens keep the dtype that they come in: under autocast the stream between the blocks is as narrow
as the matrix products, and norms, whose sums need it, are computed in float32 inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from opensora.ops.attention import attend
from opensora.ops.layers import Mlp, modulate, normalise
from opensora.ops.pieces import Piece, Stage, cuts
from opensora.ops.positions import rotate

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class SelfAttention(nn.Module):
    """Attention of a sequence (N, L, D) to itself, queries and keys normalised per head."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, phases: Tensor | None = None, attend: Attend = attend) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # N L 3 K d
        # Queries and keys go through norm and rotation together: half the passes over memory.
        weights = torch.stack([self.q_norm.weight, self.k_norm.weight]).unsqueeze(1)  # 2 1 d
        qk = normalise(qkv[:, :, :2], weights).flatten(2, 3)  # N L 2K d
        if phases is not None:
            qk = rotate(qk, phases)
        q, k = qk.unflatten(2, (2, -1)).unbind(2)
        v = qkv[:, :, 2]
        return self.proj(attend(q, k, v).flatten(2))  # N L D


class CrossAttention(nn.Module):
    """Attention of video tokens (B, L, D) to text tokens (B, S, D)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1))  # B L K d
        k, v = self.kv_linear(text).unflatten(-1, (2, self.num_heads, -1)).unbind(2)  # B S K d
        return self.proj(attend(q, k, v, mask=mask).flatten(2))  # B L D


@dataclass(frozen=True)
class Places:
    """Where tokens are, and how those of a temporal block see each other.

    Attributes:
        grid: tokens down and across a frame.
        window: tokens down and across a window, (1, 1) for a single location.
        phases: rotary phases of a window's tokens, frame by frame.
        attend: `ops.attention.attend`, or one that knows which rank holds which frames.
    """

    grid: tuple[int, int]
    window: tuple[int, int]
    phases: Tensor
    attend: Attend = attend

    @property
    def num_windows(self) -> int:
        return (self.grid[0] // self.window[0]) * (self.grid[1] // self.window[1])

    @property
    def row_tokens(self) -> int:
        """Tokens of a frame in one row of windows."""
        return self.window[0] * self.grid[1]

    def rows(self, tokens: int) -> Places:
        """The places of some whole rows of windows, which are a picture of the same kind."""
        return replace(self, grid=(tokens // self.grid[1], self.grid[1]))

    def by_window(self, x: Tensor) -> Tensor:
        """(B, T, N, D), row by row, as (B, T, windows, tokens of a window, D)."""
        return rearrange(
            x,
            "b t (i y j x) d -> b t (i j) (y x) d",
            i=self.grid[0] // self.window[0],
            y=self.window[0],
            x=self.window[1],
        )

    def by_row(self, x: Tensor) -> Tensor:
        """The inverse of `by_window`."""
        return rearrange(
            x,
            "b t (i j) (y x) d -> b t (i y j x) d",
            i=self.grid[0] // self.window[0],
            y=self.window[0],
        )


class STDiTBlock(nn.Module):
    """Self-attention over one axis, cross-attention, MLP; shift, scale and gate from the level."""

    varying_dims: ClassVar = {"text": 1, "mask": 1}
    """Arguments of `forward` whose length in this dim may be another one with every batch."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, *, temporal: bool):
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(width, num_heads)
        self.cross_attn = CrossAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self, x: Tensor, text: Tensor, mask: Tensor, level: Tensor, places: Places
    ) -> Tensor:
        """x: (B, T, N, D) tokens of T frames; level: (B, T, 6, D) from the shared projection."""
        modulation = self._modulation(level)
        return self._each(self._among(x, modulation, places), text, mask, modulation)

    def _modulation(self, level: Tensor) -> tuple[Tensor, ...]:
        modulation = (level + self.scale_shift_table).unsqueeze(3)
        return modulation.unbind(2)  # B T 1 D each: shift, scale and gate of the one and the other

    def _among(self, x: Tensor, modulation: tuple[Tensor, ...], places: Places) -> Tensor:
        """What tokens tell each other."""
        shift, scale, gate = modulation[:3]
        h = self._attend(modulate(self.norm1(x).to(x.dtype), shift, scale), places)
        return torch.addcmul(x, gate.to(x.dtype), h)

    def _each(
        self, x: Tensor, text: Tensor, mask: Tensor, modulation: tuple[Tensor, ...]
    ) -> Tensor:
        """What every token does alone."""
        shift, scale, gate = modulation[3:]
        h = self.cross_attn(x.flatten(1, 2), text, mask)  # B L D
        x = x + h.view(x.shape)
        h = self.mlp(modulate(self.norm2(x).to(x.dtype), shift, scale))
        return torch.addcmul(x, gate.to(x.dtype), h)

    def _attend(self, x: Tensor, places: Places) -> Tensor:
        """Self-attention over a frame, over time at one location, or over time in a window."""
        batch, frames = x.shape[:2]
        if not self.temporal:
            x = self.attn(x.flatten(0, 1))  # BT N D
            return x.unflatten(0, (batch, frames))
        x = places.by_window(x)  # B T W M D
        x = self.attn(rearrange(x, "b t w m d -> (b w) (t m) d"), places.phases, places.attend)
        size = places.window[0] * places.window[1]
        return places.by_row(rearrange(x, "(b w) (t m) d -> b t w m d", b=batch, t=frames, m=size))

    def stages(
        self,
        forward: Callable[..., Tensor],
        tiles: int,
        x: Tensor,
        text: Tensor,
        mask: Tensor,
        level: Tensor,
        places: Places,
    ) -> list[Stage]:
        """The block (`opensora.ops.pieces`) by clips, by frames or by rows of windows.

        With far fewer of those than tiles, attention is a stage of its own and what tokens do
        alone is cut finer.
        """
        dim, unit = (2, places.row_tokens) if self.temporal else (1, 1)
        if x.shape[0] > x.shape[dim] // unit:
            dim, unit = 0, 1
        parts = cuts(x.shape[dim], tiles, unit=unit)
        finer = cuts(x.shape[2], tiles)
        if len(finer) < 2 * len(parts):
            return [[_piece(dim, part, forward) for part in parts]]

        def among(x: Tensor, text: Tensor, mask: Tensor, level: Tensor, places: Places) -> Tensor:
            return self._among(x, self._modulation(level), places)

        def each(x: Tensor, text: Tensor, mask: Tensor, level: Tensor, places: Places) -> Tensor:
            return self._each(x, text, mask, self._modulation(level))

        return [
            [_piece(dim, part, among) for part in parts],
            [_piece(2, part, each) for part in finer],
        ]


def _piece(dim: int, part: slice, call: Callable[..., Tensor]) -> Piece:
    """A part of the tokens (B, T, N, D) along one dim, with what belongs to it of the rest."""

    def run(x: Tensor, text: Tensor, mask: Tensor, level: Tensor, places: Places) -> Tensor:
        if dim == 0:
            return call(x, text[part], mask[part], level[part], places)
        if dim == 1:
            return call(x, text, mask, level[:, part], places)
        return call(x, text, mask, level, places.rows(x.shape[2]))

    return Piece((*(slice(None),) * dim, part), run)


class FinalLayer(nn.Module):
    """Modulated norm and the projection back to patches."""

    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_features)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """x: (B, T, N, D); level: (B, T, D)."""
        shift, scale = (level[:, :, None] + self.scale_shift_table).unsqueeze(3).unbind(2)
        return self.linear(modulate(self.norm_final(x).to(x.dtype), shift, scale))

    def stages(
        self, forward: Callable[..., Tensor], tiles: int, x: Tensor, level: Tensor
    ) -> list[Stage]:
        """Every token by itself (`opensora.ops.pieces`)."""
        return [[Piece((slice(None),) * 2 + (part,), forward) for part in cuts(x.shape[2], tiles)]]
