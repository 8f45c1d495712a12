"""What memory decides when nobody else does, and what to change when it did not suffice.

Both decisions come from a rehearsal (`infer.forecast`) on the sizes of the call, which is made once
for each, and from what is free, or from a budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from opensora.errors import OutOfMemory
from opensora.infer import forecast
from opensora.infer.savings import DecodeConfig, SavingsConfig
from opensora.infer.settings import Shape
from opensora.memory import free_bytes, is_out_of_memory
from opensora.zoo import DenoiserConfig, VAEConfig

Phase = Literal["denoising", "decoding"]

MARGIN = 1.2
"""What memory has to be there for one that a rehearsal finds (inferred, not measured on a GPU)."""

AMPLE = {"denoiser": 4 * 64, "decoder": 4 * 8}
"""More bytes than a call has alive at a time, for each channel of a position of a denoiser (4 to 14
floats in rehearsals) or of a pixel of a decoder (less than one). Where memory is there for so many
nothing is rehearsed: that takes half a second, and imports half of torch."""

NUM_FIXES = 3

_CALLS: dict[tuple[Any, ...], int] = {}
"""Peak bytes of calls that this process has rehearsed, by all that they depend on."""


def shares_a_call(
    config: DenoiserConfig, latents: tuple[int, int, int, int], rows: int, words: int, free: float
) -> bool:
    """Whether memory is there for all branches of guidance in one call.

    Args:
        latents: (C, T, H, W) of a video.
        rows: videos times branches.
        words: tokens of a prompt.
        free: bytes that are free.
    """
    if AMPLE["denoiser"] * rows * (math.prod(latents[1:]) + words) * config.width <= free:
        return True
    key = (config.model_dump_json(), latents, rows, words)
    if key not in _CALLS:
        _CALLS[key] = forecast.denoiser(config, latents, rows, words=words).forward
    return MARGIN * _CALLS[key] <= free


def decoding(
    config: VAEConfig,
    latents: tuple[int, int, int, int],
    rows: int,
    asked: DecodeConfig,
    free: float,
    *,
    tiled: bool | None = None,
) -> DecodeConfig:
    """How videos are decoded where `tile` is auto: whole, else some latent frames at a time, else
    in tiles; the first that fits, or the smallest.

    Args:
        latents: (C, T, H, W) of a video.
        rows: videos.
        tiled: what was decided before; only the rest is open.
    """
    if asked.tile != "auto":
        return asked
    chunks = [asked.chunk] if asked.chunk is not None else [None, 1]
    ways = [asked.model_copy(update={"tile": False, "chunk": chunk}) for chunk in chunks]
    if tiled is not False and (tiled or max(latents[2:]) > asked.tiling.tile):
        smallest = asked.model_copy(update={"tile": True, "chunk": chunks[-1]})
        ways = [smallest] if tiled else [*ways, smallest]
    ample = AMPLE["decoder"] * rows * _pixels(config, latents) * max(config.widths)
    if ample <= free and not tiled:
        return ways[0]
    for way in ways[:-1]:
        if MARGIN * _decoding(config, latents, rows, way) <= free:
            return way
    return ways[-1]


def _pixels(config: VAEConfig, latents: tuple[int, int, int, int]) -> int:
    return math.prod(latents[1:]) * math.prod(config.stride)


def _decoding(
    config: VAEConfig, latents: tuple[int, int, int, int], rows: int, way: DecodeConfig
) -> int:
    key = (config.model_dump_json(), latents, rows, way.model_dump_json())
    if key not in _CALLS:
        _CALLS[key] = forecast.decoding(config, latents, rows, way)
    return _CALLS[key]


def told(way: DecodeConfig) -> str:
    """A line on a decision of `decoding`; empty where all is decoded as a whole."""
    frames = f"{way.chunk} latent frame{'s' if way.chunk != 1 else ''} at a time"
    parts = [frames] * (way.chunk is not None) + ["in tiles"] * (way.tile is True)
    if not parts:
        return ""
    options = "--tile-vae always" if way.tile else f"--tile-vae never --decode-chunk {way.chunk}"
    return f"decoded {', '.join(parts)}, for want of memory ({options} asks for it)"


@contextmanager
def out_of_memory(
    device: torch.device,
    savings: SavingsConfig,
    phase: Phase,
    shape: Shape,
    batch: int,
    *,
    calls: int = 1,
) -> Iterator[None]:
    """Turn an allocator's refusal inside the block into one line.

    Args:
        device, savings: of the pipeline.
        batch: videos.
        calls: branches of guidance that share a call.

    Raises:
        OutOfMemory: with what was drawn, what is free, and three changes.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        size = f"{shape.num_frames}x{shape.height}x{shape.width}"
        changes = fixes(savings, phase, shape, batch, calls=calls, device=device.type)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OutOfMemory(
            f"out of memory in {phase} {batch} x {size} on {device} "
            f"({free_bytes(device) / 1e9:.2f} GB free): use {'; or '.join(changes)}. "
            f"`opensora plan CHECKPOINT --sample` says what fits. ({reason[:200]})"
        ) from error


def fixes(
    savings: SavingsConfig, phase: Phase, shape: Shape, batch: int, *, calls: int, device: str
) -> list[str]:
    """The first changes that are not made yet, as options, in the order of what they cost."""
    tile, chunk = savings.decode.tile, savings.decode.chunk
    decodes, away = phase == "decoding", device != "cpu" and not savings.offload
    changes = [
        (decodes and chunk is None, "--decode-chunk 1 (the same video)"),
        (not decodes and calls > 1, "--set guidance.batched=false (the same video)"),
        (batch > 1, f"--batch-size {batch // 2} (the same videos)"),
        (away, "--offload (the same video)"),
        (decodes and tile is not True, "--tile-vae always"),
        (not decodes and savings.quantize == "none", "--quantize int8"),
        (shape.num_frames > 1, f"fewer --frames than {shape.num_frames}"),
        (True, f"a smaller size than {shape.height}x{shape.width} (--height, --width)"),
        (True, "a device with more memory (--device)"),
    ]
    return [text for applies, text in changes if applies][:NUM_FIXES]
