"""STDiT: a video transformer that attends within frames, then across frames, then to the text.

The layout follows Open-Sora 1.2's STDiT3 (spatial and temporal blocks alternate, PixArt's shared
adaLN, rotary time, normalised queries and keys) with one difference: every frame carries its own
noise level, so given and generated frames are told apart by level alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from opensora.config import Config
from opensora.models.stdit_blocks import FinalLayer, Places, STDiTBlock
from opensora.ops.layers import Mlp, ScalarEmbedder, linears, patchify, unpatchify
from opensora.ops.positions import rotary_phases, sincos_2d, sinusoid
from opensora.types import Condition

Plan = Callable[["STDiT", Tensor, Tensor, Condition], Tensor]


class STDiTConfig(Config):
    """Architecture of `STDiT`; the defaults are STDiT3-XL/2's."""

    kind: Literal["stdit"] = "stdit"
    width: int = Field(default=1152, ge=8, description="D, features of a token")
    depth: int = Field(default=28, ge=1, description="pairs of a spatial and a temporal block")
    num_heads: int = Field(default=16, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    patch: tuple[int, int, int] = Field(
        default=(1, 2, 2), description="latent positions in a token"
    )
    base_size: int = Field(
        default=32,
        ge=1,
        description="positions are scaled as if the picture were this many tokens wide",
    )
    text_channels: int = Field(default=4096, ge=1, description="D of the condition's tokens")
    pooled_channels: int = Field(
        default=0,
        ge=0,
        description="P of the condition's pooled text, added to the level; 0 ignores it",
    )
    window: tuple[int, int] | None = Field(
        default=None,
        description="temporal blocks attend over all frames of windows of this many tokens down "
        "and across, with rotary positions on three axes (Open-Sora 1.3); windows that do not "
        "divide the picture are made smaller; None: attend over time at one location",
    )
    absolute_time: bool = Field(
        default=False,
        description="add a fixed code of the frame's number to its tokens (Latte); rotary time "
        "alone says how far frames are apart, from which small models learn motion slowly",
    )
    condition_on_size: bool = Field(
        default=False, description="embed height and width as well as fps"
    )

    layers: ClassVar = {"depth": (2, 1)}
    """Depths, and from which on and in which steps each adds the same (`planner.extrapolate`)."""

    @model_validator(mode="after")
    def _divides(self) -> STDiTConfig:
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(
                f"width {self.width} needs to be num_heads ({self.num_heads}) times an even number"
            )
        if self.width % 4:
            raise ValueError(f"width {self.width} must be divisible by 4 for the 2-D positions")
        if self.window is not None and self.width // self.num_heads < 6:
            raise ValueError("heads need 6 features or more for rotary positions on three axes")
        if self.patch[0] != 1:
            raise ValueError("patch must span one latent frame: noise levels are per frame")
        return self


@dataclass(frozen=True)
class Stream:
    """What runs through the blocks.

    Attributes:
        tokens: (B, T, N, D) of the frames at hand.
        text: (B, S, D).
        mask: bool (B, S).
        level: (B, T, D) of the same frames as `modulation`.
        modulation: (B, T, 6, D) shared by the blocks; of all frames.
        places: of the whole clip.
    """

    tokens: Tensor
    text: Tensor
    mask: Tensor
    level: Tensor
    modulation: Tensor
    places: Places


def together(pair: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Run a pair of blocks; an engine may put another way of running it in this one's place."""
    return pair(*inputs)


class STDiT(nn.Module):
    """The denoiser `model(x, t, cond) -> prediction`, same shape as x."""

    def __init__(self, config: STDiTConfig, *, in_channels: int):
        super().__init__()
        self.config = config
        self.in_channels = in_channels
        width = config.width
        patch_features = in_channels * config.patch[0] * config.patch[1] * config.patch[2]
        self.x_embedder = nn.Linear(patch_features, width)
        self.t_embedder = ScalarEmbedder(width, scale=1000.0)
        self.fps_embedder = ScalarEmbedder(width)
        if config.condition_on_size:
            self.size_embedder = ScalarEmbedder(width // 2)
        if config.pooled_channels:
            self.pooled_embedder = Mlp(config.pooled_channels, width, width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = Mlp(config.text_channels, width, width)
        sizes = (width, config.num_heads, config.mlp_ratio)
        self.spatial_blocks = nn.ModuleList(
            STDiTBlock(*sizes, temporal=False) for _ in range(config.depth)
        )
        self.temporal_blocks = nn.ModuleList(
            STDiTBlock(*sizes, temporal=True) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(width, patch_features)
        self.group: Callable[..., Tensor] = together
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier weights; the residual branches of temporal blocks and the output start at zero."""
        for linear in linears(self):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for part in (self.t_embedder, self.fps_embedder, self.t_block):
            for linear in linears(part):
                nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linears(self.fps_embedder)[-1].weight)
        for block in self.modules():
            if isinstance(block, STDiTBlock):
                nn.init.zeros_(block.cross_attn.proj.weight)
                if block.temporal:
                    nn.init.zeros_(block.attn.proj.weight)
                    nn.init.zeros_(block.mlp.fc2.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @property
    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Spatial and temporal blocks, in order of use."""
        return list(zip(self.spatial_blocks, self.temporal_blocks, strict=True))

    @property
    def blocks(self) -> list[nn.Module]:
        """The units that an engine shards, recomputes or compiles, in order of use."""
        return [block for pair in self.pairs for block in pair]

    def forward(self, x: Tensor, t: Tensor, cond: Condition, *, plan: Plan | None = None) -> Tensor:
        """Predict from noisy latents.

        Args:
            x: float (B, C, T, H, W).
            t: float (B, T) or (B,), noise levels in [0, 1]; 0 marks a frame as given.
            cond: text tokens (B, S, text_channels) with their mask, pooled text, fps, size.
            plan: runs `enter`, the blocks and `leave` in another way, such as on several ranks,
                and returns what that is to return.

        Returns:
            float (B, C, T, H, W), in the meaning that the objective gave it.
        """
        if plan is not None:
            return plan(self, x, t, cond)
        stream = self.enter(x, t, cond)
        rest = (stream.text, stream.mask, stream.modulation, stream.places)

        def pair(tokens: Tensor, spatial: nn.Module, temporal: nn.Module) -> Tensor:
            return temporal(spatial(tokens, *rest), *rest)

        tokens = stream.tokens
        for blocks in self.pairs:
            tokens = self.group(pair, tokens, *blocks)
        return self.leave(tokens, stream.level, stream.places.grid)

    def enter(
        self, x: Tensor, t: Tensor, cond: Condition, *, frames: slice = slice(None)
    ) -> Stream:
        """What comes before the blocks.

        Args:
            x, t, cond: as in `forward`.
            frames: those whose tokens are wanted; levels and places are the whole clip's.
        """
        batch, _, num_frames, height, width = x.shape
        _, down, across = self.config.patch
        if height % down or width % across:
            raise ValueError(
                f"latents of {height}x{width} do not divide into patches of {down}x{across}"
            )
        grid = (height // down, width // across)
        tokens = self.x_embedder(patchify(x[:, :, frames], self.config.patch))  # B T N D
        positions = self._positions(num_frames, grid, x.device)
        tokens = tokens + (positions[frames] if len(positions) > 1 else positions).to(tokens.dtype)
        if t.dim() == 1:
            t = t[:, None]
        level = self.t_embedder(t.expand(batch, num_frames))  # B T D
        level = level + self._context(cond).unsqueeze(1)  # B T D
        modulation = self.t_block(level).unflatten(-1, (6, -1))  # B T 6 D
        text = self.y_embedder(cond.tokens.to(tokens.dtype))  # B S D
        places = self._places(num_frames, grid, x.device)
        return Stream(tokens, text, cond.mask, level, modulation, places)

    def leave(self, tokens: Tensor, level: Tensor, grid: tuple[int, int]) -> Tensor:
        """What comes after the blocks: (B, T, N, D) tokens and the (B, T, D) level of their frames
        -> (B, C, T, H, W)."""
        return unpatchify(self.final_layer(tokens, level), self.config.patch, grid)

    def _positions(self, frames: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """(T or 1, N, D); a larger picture spreads the same positions, as in PixArt (Chen et al.
        2023)."""
        scale = self.config.base_size / (grid[0] * grid[1]) ** 0.5
        rows = torch.arange(grid[0], device=device) * scale
        columns = torch.arange(grid[1], device=device) * scale
        space = sincos_2d(rows, columns, self.config.width)[None]  # 1 N D
        if not self.config.absolute_time:
            return space
        time = sinusoid(torch.arange(frames, device=device), self.config.width)  # T D
        return space + time[:, None]

    def _places(self, frames: int, grid: tuple[int, int], device: torch.device) -> Places:
        """Windows are made to fit: the largest that divide the grid and are not above the config's.

        Windows do not overlap; the spatial blocks between them carry information across.
        """
        head = self.config.width // self.config.num_heads
        time = torch.arange(frames, device=device)
        if self.config.window is None:
            return Places(grid, (1, 1), rotary_phases(time[:, None], (head,)))
        sides = zip(grid, self.config.window, strict=True)
        down, across = (max(k for k in range(1, w + 1) if g % k == 0) for g, w in sides)
        axes = (time, torch.arange(down, device=device), torch.arange(across, device=device))
        positions = torch.cartesian_prod(*axes)  # L 3
        each = head // 3 // 2 * 2
        return Places(grid, (down, across), rotary_phases(positions, (head - 2 * each, each, each)))

    def _context(self, cond: Condition) -> Tensor:
        """(B, D): what is said of the whole clip."""
        fps = cond.fps if cond.fps is not None else cond.tokens.new_zeros(len(cond))
        context = self.fps_embedder(fps)
        if self.config.condition_on_size:
            if cond.size is None:
                raise ValueError("this model needs sizes, but cond.size is None")
            context = context + self.size_embedder(cond.size).flatten(1)  # height, then width
        if self.config.pooled_channels:
            if cond.pooled is None:
                raise ValueError("this model needs pooled text, but cond.pooled is None")
            context = context + self.pooled_embedder(cond.pooled.to(context.dtype))
        return context
