"""MMDiT: a video transformer that attends to all frames and to the text at once.

Blocks of two streams, in which text and video have weights of their own and meet in attention
(Stable Diffusion 3, Esser et al. 2024, arXiv 2403.03206), then blocks of a single stream; the
layout is that of FLUX.1, HunyuanVideo and Open-Sora 2.0 (arXiv 2503.09642). But every frame carries
its own noise level, so given and generated frames are told apart by level alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from opensora.config import Config
from opensora.ops.attention import attend
from opensora.ops.layers import (
    Mlp,
    RMSNorm,
    ScalarEmbedder,
    linears,
    modulate,
    patchify,
    unpatchify,
)
from opensora.ops.pieces import Piece, Stage, cuts
from opensora.ops.positions import rotary_phases, rotate
from opensora.types import Condition

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values (B, L, K, d)."""
Attend = Callable[[Heads, Heads, Tensor], tuple[Tensor, Tensor]]
"""(video, text, mask of the text) -> what video and text saw, (B, L, K, d) and (B, S, K, d)."""
Both = tuple[Tensor, Tensor]
Plan = Callable[["MMDiT", Tensor, Tensor, Condition], Tensor]


class MMDiTConfig(Config):
    """Architecture of `MMDiT`; the defaults are Open-Sora 2.0's, 11.9 billion parameters."""

    kind: Literal["mmdit"] = "mmdit"
    width: int = Field(default=3072, ge=8, description="D, features of a token")
    depth: int = Field(default=19, ge=0, description="blocks with a stream each for video and text")
    single_depth: int = Field(
        default=38, ge=1, description="blocks that treat video and text alike, which come after"
    )
    num_heads: int = Field(default=24, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    patch: tuple[int, int, int] = Field(
        default=(1, 2, 2), description="latent positions in a token"
    )
    rope: tuple[int, int, int] = Field(
        default=(16, 56, 56),
        description="features of a head that turn with the frame, the row and the column; even "
        "numbers whose sum is a head's width",
    )
    text_channels: int = Field(default=4096, ge=1, description="D of the condition's tokens")
    pooled_channels: int = Field(
        default=768,
        ge=0,
        description="P of the condition's pooled text, added to the level; 0 ignores it",
    )

    layers: ClassVar = {"depth": (2, 2), "single_depth": (8, 2)}
    """Depths, and from which on and in which steps each adds the same. Pairs may be recomputed
    together, and what a double block holds while it is recomputed is as much as the inputs of a few
    single ones."""

    @model_validator(mode="after")
    def _divides(self) -> MMDiTConfig:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} needs to be a multiple of num_heads")
        head = self.width // self.num_heads
        if sum(self.rope) != head or any(n < 0 or n % 2 for n in self.rope):
            raise ValueError(
                f"rope {list(self.rope)} needs even numbers whose sum is a head's width, "
                f"{self.width} / {self.num_heads} = {head}"
            )
        if self.patch[0] != 1:
            raise ValueError("patch must span one latent frame: noise levels are per frame")
        return self


class JointAttention(nn.Module):
    """The layers around attention of one stream: (B, L, D) -> q, k, v, and back to (B, L, D).

    Queries, keys and values have matrices of their own, so that heads can be dealt to ranks.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.head_dim = width // num_heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)
        self.proj = nn.Linear(width, width)

    def heads(self, x: Tensor) -> Heads:
        """Queries and keys, normalised per head, and values; as many heads as this rank has."""
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q, self.k, self.v))
        return self.q_norm(q), self.k_norm(k), v  # B L K d each


def attend_together(video: Heads, text: Heads, mask: Tensor) -> Both:
    """Attention of text and video tokens to all of them but the padding of the text."""
    q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, video, strict=True))  # B S+L K d
    seen = torch.cat([mask, mask.new_ones(q.shape[0], video[0].shape[1])], dim=1)  # B S+L
    out = attend(q, k, v, mask=seen)
    words = text[0].shape[1]
    return out[:, words:], out[:, :words]


@dataclass(frozen=True)
class Places:
    """Where tokens are, and how they see each other.

    Attributes:
        grid: tokens down and across a frame.
        phases: rotary phases (L, d / 2, 2) of the video tokens at hand. Text does not turn.
        attend: `attend_together`, or one that knows which rank holds which frames.
    """

    grid: tuple[int, int]
    phases: Tensor
    attend: Attend = attend_together

    def turned(self, heads: Heads) -> Heads:
        """Queries and keys of video tokens at their places."""
        q, k, v = heads
        return rotate(q, self.phases), rotate(k, self.phases), v


@dataclass(frozen=True)
class Stream:
    """What runs through the blocks.

    Attributes:
        tokens: (B, T, N, D) of the frames at hand.
        text: (B, S, D).
        mask: bool (B, S).
        level: (B, 1 + T, D), of the text and of the same frames, past its activation.
        places: of the frames at hand.
    """

    tokens: Tensor
    text: Tensor
    mask: Tensor
    level: Tensor
    places: Places


class TokenMlp(Mlp):
    """An MLP of many tokens, which may be computed some of them at a time."""

    def stages(
        self, forward: Callable[..., Tensor], tiles: int, tokens: Tensor, *others: Any
    ) -> list[Stage]:
        """As in `opensora.ops.pieces.Divisible`; cuts the longest dim before the last."""
        sizes = tokens.shape[:-1]
        before = (slice(None),) * max(range(len(sizes)), key=lambda dim: sizes[dim])
        parts = cuts(sizes[len(before)], tiles)
        return [[Piece((*before, part), forward) for part in parts]]


class DoubleBlock(nn.Module):
    """Video and text side by side, each with its own modulation, attention layers and MLP."""

    varying_dims: ClassVar = {"text": 1, "mask": 1}
    """Arguments of `forward` whose length in this dim may be another one with every batch."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.mod = nn.Linear(width, 6 * width)
        self.text_mod = nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = JointAttention(width, config.num_heads)
        self.text_attn = JointAttention(width, config.num_heads)
        self.mlp = TokenMlp(width, hidden)
        self.text_mlp = Mlp(width, hidden)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, level: Tensor, places: Places) -> Both:
        """x: (B, T, N, D); text: (B, S, D); mask: (B, S); level: (B, 1 + T, D), text first."""
        shift1, scale1, gate1, shift2, scale2, gate2 = _chunks(self.mod(level[:, 1:]), 6)
        text_modulation = self.text_mod(level[:, :1]).chunk(6, dim=-1)  # B 1 D each
        text_shift1, text_scale1, text_gate1, text_shift2, text_scale2, text_gate2 = text_modulation
        video = self.attn.heads(modulate(self.norm(x), shift1, scale1).flatten(1, 2))
        words = self.text_attn.heads(modulate(self.norm(text), text_shift1, text_scale1))
        out, text_out = places.attend(places.turned(video), words, mask)
        out = self.attn.proj(out.flatten(2)).view(x.shape)  # B T N D
        text_out = self.text_attn.proj(text_out.flatten(2))  # B S D
        x = torch.addcmul(x, gate1, out)
        text = torch.addcmul(text, text_gate1, text_out)
        x = torch.addcmul(x, gate2, self.mlp(modulate(self.norm(x), shift2, scale2)))
        text_out = self.text_mlp(modulate(self.norm(text), text_shift2, text_scale2))
        return x, torch.addcmul(text, text_gate2, text_out)


class SingleBlock(nn.Module):
    """Video and text as one sequence with the same weights; attention and MLP side by side."""

    varying_dims: ClassVar = DoubleBlock.varying_dims

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        width = config.width
        self.mod = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = JointAttention(width, config.num_heads)
        self.mlp = TokenMlp(width, int(width * config.mlp_ratio))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, level: Tensor, places: Places) -> Both:
        """As `DoubleBlock.forward`."""
        shift, scale, gate = _chunks(self.mod(level), 3)  # B 1+T 1 D each
        words = modulate(self.norm(text), shift[:, 0], scale[:, 0])
        video = modulate(self.norm(x), shift[:, 1:], scale[:, 1:]).flatten(1, 2)
        h = torch.cat([words, video], dim=1)  # B S+L D
        sizes = [text.shape[1], video.shape[1]]
        both = zip(*(part.split(sizes, dim=1) for part in self.attn.heads(h)), strict=True)
        text_heads, video_heads = both
        out, text_out = places.attend(places.turned(video_heads), text_heads, mask)
        h = self.attn.proj(torch.cat([text_out, out], dim=1).flatten(2)) + self.mlp(h)  # B S+L D
        text_out, out = h.split(sizes, dim=1)
        text = torch.addcmul(text, gate[:, 0], text_out)
        return torch.addcmul(x, gate[:, 1:], out.view(x.shape)), text


def _chunks(modulation: Tensor, count: int) -> tuple[Tensor, ...]:
    """(B, T, count * D) as tensors (B, T, 1, D), alike for all tokens of a frame."""
    return modulation.unsqueeze(2).chunk(count, dim=-1)


class FinalLayer(nn.Module):
    """Modulated norm and the projection back to patches."""

    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.mod = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_features)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """x: (B, T, N, D); level: (B, T, D)."""
        shift, scale = _chunks(self.mod(level), 2)
        return self.linear(modulate(self.norm(x), shift, scale))


def together(pair: Callable[..., Any], *inputs: Any) -> Any:
    """Run a pair of blocks; an engine may put another way of running it in this one's place."""
    return pair(*inputs)


class MMDiT(nn.Module):
    """The denoiser `model(x, t, cond) -> prediction`, same shape as x."""

    def __init__(self, config: MMDiTConfig, *, in_channels: int):
        super().__init__()
        self.config = config
        self.in_channels = in_channels
        width = config.width
        patch_features = in_channels * config.patch[0] * config.patch[1] * config.patch[2]
        self.x_embedder = nn.Linear(patch_features, width)
        self.text_embedder = nn.Linear(config.text_channels, width)
        self.t_embedder = ScalarEmbedder(width, scale=1000.0)
        self.fps_embedder = ScalarEmbedder(width)
        if config.pooled_channels:
            self.pooled_embedder = Mlp(config.pooled_channels, width, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_depth))
        self.final_layer = FinalLayer(width, patch_features)
        self.group: Callable[..., Any] = together
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier weights; modulations and the output start at zero (adaLN-zero, Peebles & Xie
        2023), so that a fresh block hands on what it got."""
        for linear in linears(self):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for embedder in (self.t_embedder, self.fps_embedder):
            for linear in linears(embedder):
                nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linears(self.fps_embedder)[-1].weight)
        for name, module in self.named_modules():
            if name.endswith("mod") and isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @property
    def blocks(self) -> list[nn.Module]:
        """The units that an engine shards, recomputes or compiles, in order of use."""
        return [*self.double_blocks, *self.single_blocks]

    @property
    def pairs(self) -> list[list[nn.Module]]:
        """Neighbours of a kind two by two, in order of use; the last of a kind may be alone."""
        kinds = (list(self.double_blocks), list(self.single_blocks))
        return [kind[i : i + 2] for kind in kinds for i in range(0, len(kind), 2)]

    def forward(self, x: Tensor, t: Tensor, cond: Condition, *, plan: Plan | None = None) -> Tensor:
        """Predict from noisy latents.

        Args:
            x: float (B, C, T, H, W).
            t: float (B, T) or (B,), noise levels in [0, 1]; 0 marks a frame as given.
            cond: text tokens (B, S, text_channels) with their mask, pooled text, fps.
            plan: runs `enter`, `through` and `leave` in another way, such as on several ranks, and
                returns what that is to return.

        Returns:
            float (B, C, T, H, W), in the meaning that the objective gave it.
        """
        if plan is not None:
            return plan(self, x, t, cond)
        return self.leave(self.through(self.enter(x, t, cond)))

    def enter(
        self, x: Tensor, t: Tensor, cond: Condition, *, frames: slice = slice(None)
    ) -> Stream:
        """What comes before the blocks.

        Args:
            x, t, cond: as in `forward`.
            frames: those whose tokens are wanted.
        """
        batch, _, num_frames, height, width = x.shape
        _, down, across = self.config.patch
        if height % down or width % across:
            raise ValueError(
                f"latents of {height}x{width} do not divide into patches of {down}x{across}"
            )
        grid = (height // down, width // across)
        tokens = self.x_embedder(patchify(x[:, :, frames], self.config.patch))  # B T N D
        text = self.text_embedder(cond.tokens.to(tokens.dtype))  # B S D
        t = (t[:, None] if t.dim() == 1 else t).expand(batch, num_frames)
        levels = torch.cat([level_of_text(t), t[:, frames]], dim=1)  # B 1+T
        level = functional.silu(self.t_embedder(levels) + self._context(cond)[:, None])
        axes = (torch.arange(n, device=x.device) for n in (num_frames, *grid))
        positions = torch.cartesian_prod(*axes).view(num_frames, -1, 3)[frames]  # T N 3
        phases = rotary_phases(positions.flatten(0, 1), self.config.rope)
        return Stream(tokens, text, cond.mask, level, Places(grid, phases))

    def through(self, stream: Stream, pairs: slice = slice(None)) -> Stream:
        """The blocks, or some pairs of them."""

        def pair(tokens: Tensor, text: Tensor, *blocks: nn.Module) -> Both:
            for block in blocks:
                tokens, text = block(tokens, text, stream.mask, stream.level, stream.places)
            return tokens, text

        tokens, text = stream.tokens, stream.text
        for blocks in self.pairs[pairs]:
            tokens, text = self.group(pair, tokens, text, *blocks)
        return Stream(tokens, text, stream.mask, stream.level, stream.places)

    def leave(self, stream: Stream) -> Tensor:
        """What comes after the blocks: the stream's tokens as (B, C, T, H, W)."""
        tokens = self.final_layer(stream.tokens, stream.level[:, 1:])
        return unpatchify(tokens, self.config.patch, stream.places.grid)

    def _context(self, cond: Condition) -> Tensor:
        """(B, D): what is said of the whole clip."""
        fps = cond.fps if cond.fps is not None else cond.tokens.new_zeros(len(cond))
        context = self.fps_embedder(fps)
        if self.config.pooled_channels:
            if cond.pooled is None:
                raise ValueError("this model needs pooled text, but cond.pooled is None")
            context = context + self.pooled_embedder(cond.pooled.to(context.dtype))
        return context


def level_of_text(t: Tensor) -> Tensor:
    """The level that text is modulated by: (B, T) -> (B, 1), the mean over frames in the making.

    With one level it is that level, as in FLUX.1; given frames (level 0) do not count, as in
    HunyuanVideo-I2V, whose text takes the level of what is generated beside a given first frame.
    """
    made = t > 0
    return (t.sum(1) / made.sum(1).clamp(min=1)).unsqueeze(1)
