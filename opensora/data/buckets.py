"""Buckets: shapes of batches, because clips share a batch only at one size and one length.

A config lists resolutions, and for each the lengths in frames with a keep-probability and a batch
size, as Open-Sora's `bucket_config` does. Sizes follow from the area by formula, in multiples of
what one token covers. `assignment.py` says which clip goes where.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import pydantic
from pydantic import Field

from opensora.config import Config
from opensora.errors import UsageError

Triple = tuple[int, int, int]

ASPECT_RATIOS = ("21:9", "16:9", "3:2", "4:3", "1:1", "3:4", "2:3", "9:16", "9:21")


class BucketRule(Config):
    """What happens to clips that fit one resolution and length.

    Written as a mapping, as Open-Sora's `[keep, batch_size]` or `[[keep, length_keep],
    batch_size]`, or as the number `keep` alone.
    """

    keep: float = Field(
        default=1.0, ge=0, le=1, description="part kept; the rest tries lower resolutions"
    )
    length_keep: float = Field(
        default=1.0, ge=0, le=1, description="part that does not try fewer frames"
    )
    batch_size: int | None = Field(
        default=None, gt=0, description="clips a step, over all ranks together"
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_open_sora(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            return {"keep": value}
        if isinstance(value, list | tuple) and len(value) == 2:
            keep, batch_size = value
            keep, length_keep = keep if isinstance(keep, list | tuple) else (keep, 1.0)
            return {"keep": keep, "length_keep": length_keep, "batch_size": batch_size}
        return value


class BucketsConfig(Config):
    """Which clips are trained on, at which sizes and lengths, and how many a step."""

    resolutions: dict[str, dict[int, BucketRule]] = Field(
        description="name -> number of frames -> rule. '256px' or '256' is the area of a 256 x 256 "
        "square, '240p' that of a 16:9 picture 240 high; 1 frame takes still pictures"
    )
    aspect_ratios: tuple[str, ...] = Field(
        default=ASPECT_RATIOS, min_length=1, description="width:height; a clip takes the nearest"
    )
    fps: float | None = Field(
        default=None, gt=0, le=1000, description="frames per second of the clips; null: their own"
    )
    frame_interval: int = Field(default=1, ge=1, description="every n-th frame, where fps is null")
    token_budget: int | None = Field(
        default=None,
        gt=0,
        description="tokens a step over all ranks; takes the place of batch sizes",
    )
    max_upscale: float = Field(
        default=1.12,
        ge=1,
        description="how far a clip may be enlarged (1.12: 0.8 of the area suffices)",
    )
    scores: dict[str, tuple[float | None, float | None]] = Field(
        default_factory=dict, description="score column -> lowest and highest value, null is open"
    )

    @pydantic.model_validator(mode="after")
    def _check(self) -> BucketsConfig:
        if self.fps is not None and self.frame_interval != 1:
            raise ValueError("fps and frame_interval exclude each other; leave one of them out")
        if not any(self.resolutions.values()):
            raise ValueError("resolutions is empty; name one, such as 256px: {17: [1.0, 8]}")
        for name, lengths in self.resolutions.items():
            num_pixels(name)
            for num_frames, rule in lengths.items():
                self._check_rule(f"resolutions.{name}.{num_frames}", num_frames, rule)
        for ratio in self.aspect_ratios:
            if not re.fullmatch(r"0*[1-9]\d*(\.\d+)?:0*[1-9]\d*(\.\d+)?", ratio):
                raise ValueError(f"the aspect ratio '{ratio}' is not width:height, such as 16:9")
        return self

    def _check_rule(self, where: str, num_frames: int, rule: BucketRule) -> None:
        if num_frames < 1:
            raise ValueError(f"{where}: a length is 1 frame or more")
        if self.token_budget is None and rule.batch_size is None:
            raise ValueError(f"{where} has no batch_size, and there is no token_budget")
        if self.token_budget is not None and rule.batch_size is not None:
            raise ValueError(f"{where} has a batch_size beside the token_budget; drop one of them")


class Bucket(NamedTuple):
    """One shape of batch.

    Attributes:
        resolution: its name in the config.
        num_frames, height, width: of the pixels.
        batch_size: clips a step, over all ranks together.
        num_tokens: of one clip.
    """

    resolution: str
    num_frames: int
    height: int
    width: int
    batch_size: int
    num_tokens: int

    @property
    def shape(self) -> str:
        """Such as '17x256x256'."""
        return f"{self.num_frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Level:
    """The buckets of one resolution.

    Attributes:
        resolution: its name in the config.
        sizes: height and width, narrow to wide.
        lengths: frames and the rule for them, longest first.
        buckets: for each length, one bucket for each size.
    """

    resolution: str
    sizes: tuple[tuple[int, int], ...]
    lengths: tuple[tuple[int, BucketRule], ...]
    buckets: tuple[tuple[Bucket, ...], ...]


def num_pixels(resolution: str) -> float:
    """The area that a resolution's name stands for.

    Raises:
        ValueError: for a name of another form.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})(p|px)?", resolution)
    if match is None:
        raise ValueError(
            f"the resolution '{resolution}' is none of NNNp (16:9, NNN high), NNNpx, NNN (square)"
        )
    side = int(match[1])
    return side * side * (16 / 9 if match[2] == "p" else 1)


def frame_sizes(
    area: float, aspect_ratios: tuple[str, ...], multiple: tuple[int, int]
) -> tuple[tuple[int, int], ...]:
    """Height and width for each aspect ratio, narrow to wide, without doubles.

    With r = width / height they are sqrt(area / r) and sqrt(area * r), each rounded to the nearest
    multiple, and at least one multiple.
    """
    sizes = set()
    for ratio in aspect_ratios:
        wide, high = (float(part) for part in ratio.split(":"))
        height, width = math.sqrt(area * high / wide), math.sqrt(area * wide / high)
        rows, columns = round(height / multiple[0]), round(width / multiple[1])
        sizes.add((max(1, rows) * multiple[0], max(1, columns) * multiple[1]))
    return tuple(sorted(sizes, key=lambda size: (size[1] / size[0], size)))


def levels(config: BucketsConfig, *, stride: Triple, patch: Triple) -> tuple[Level, ...]:
    """Every bucket of a config, highest resolution first.

    Args:
        stride: pixels per latent along (time, height, width) of the VAE. The first frame stands
            alone in time, so a length is 1 + k * stride[0].
        patch: latents per token along (time, height, width) of the model.

    Raises:
        UsageError: a length does not suit the stride, or one clip exceeds the token budget.
    """
    multiple = (stride[1] * patch[1], stride[2] * patch[2])
    found = []
    for name in sorted(config.resolutions, key=num_pixels, reverse=True):
        lengths = tuple(sorted(config.resolutions[name].items(), reverse=True))
        sizes = frame_sizes(num_pixels(name), config.aspect_ratios, multiple)
        buckets = []
        for num_frames, rule in lengths:
            if (num_frames - 1) % stride[0]:
                near = 1 + round((num_frames - 1) / stride[0]) * stride[0]
                raise UsageError(
                    f"resolutions.{name}: {num_frames} frames do not suit a VAE that takes 1 + k * "
                    f"{stride[0]} frames; use {near}"
                )
            latent_frames = 1 + (num_frames - 1) // stride[0]
            of_length = []
            for height, width in sizes:
                area = (height // multiple[0]) * (width // multiple[1])
                tokens = math.ceil(latent_frames / patch[0]) * area
                batch_size = rule.batch_size or _affordable(config, name, num_frames, tokens)
                of_length.append(Bucket(name, num_frames, height, width, batch_size, tokens))
            buckets.append(tuple(of_length))
        found.append(Level(name, sizes, lengths, tuple(buckets)))
    return tuple(found)


def _affordable(config: BucketsConfig, name: str, num_frames: int, tokens: int) -> int:
    budget = config.token_budget or 0
    if tokens > budget:
        raise UsageError(
            f"resolutions.{name}.{num_frames}: one clip has {tokens} tokens, above "
            f"token_budget={budget}; raise the budget or drop the length"
        )
    return budget // tokens
