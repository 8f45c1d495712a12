"""The data that crosses floors, and the project's one alphabet of shapes.

    B batch   F pixel frames   T H W latent frames, height, width   C channels
    L video tokens   S text tokens   K heads   D width

`axis` is a mesh axis, `dim` a tensor dimension. Pixels are uint8 (F, H, W, 3) from the decoder and
float (C, F, H, W) in [-1, 1] for the VAE.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """Decoded frames as they left the decoder.

    Attributes:
        frames: uint8 (F, H, W, 3), full-range sRGB-like RGB, upright (rotation applied).
        timestamps: float64 (F,), seconds from the start of the video stream, non-decreasing.
        fps: frames per second that `timestamps` amount to.
        path: where the frames came from, for messages.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    fps: float
    path: str = ""


@dataclass(frozen=True)
class VideoBatch:
    """A batch of pixel clips of one shape.

    Attributes:
        pixels: float32 (B, 3, F, H, W) in [-1, 1].
        texts: B captions.
        sample_ids: int64 (B,), the rows of the manifest; randomness is addressed by them.
        fps: float32 (B,), frames per second of the pixels.
        replaced: how many samples stand in for unreadable ones.
    """

    pixels: Tensor
    texts: tuple[str, ...]
    sample_ids: Tensor
    fps: Tensor
    replaced: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: slice) -> VideoBatch:
        """Some of the samples; `replaced` stays with the whole batch."""
        return VideoBatch(
            self.pixels[index], self.texts[index], self.sample_ids[index], self.fps[index]
        )


@dataclass(frozen=True)
class LatentBatch:
    """A batch of cached latents of one shape.

    Attributes:
        latents: float32 (B, C, T, H, W), normalised to zero mean and unit variance per channel.
        texts: B captions.
        sample_ids: int64 (B,).
        fps: float32 (B,), frames per second of the pixels that were encoded.
        features: cached text features per sample, or None where the text encoder runs in the step.
        replaced: how many samples stand in for unreadable ones.
    """

    latents: Tensor
    texts: tuple[str, ...]
    sample_ids: Tensor
    fps: Tensor
    features: Condition | None = None
    replaced: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: slice) -> LatentBatch:
        """Some of the samples; `replaced` stays with the whole batch."""
        return LatentBatch(
            self.latents[index],
            self.texts[index],
            self.sample_ids[index],
            self.fps[index],
            None if self.features is None else self.features[index],
        )


@dataclass(frozen=True)
class MixedBatch:
    """What a rank has of a step that mixes shapes.

    Attributes:
        pieces: batches of one shape each, those that ranks share first; may be none.
        stand_in: a batch of one clip to call the model with, for nothing, where other ranks call
            it more often; None where the last piece can be taken. Ranks that share its clip all
            have nothing else to do then.
    """

    pieces: tuple[VideoBatch | LatentBatch, ...]
    stand_in: VideoBatch | LatentBatch | None = None


@dataclass(frozen=True)
class Condition:
    """What a denoiser is told beside the noisy latents and their levels.

    Attributes:
        tokens: float (B, S, D) text features.
        mask: bool (B, S), True where a token is real; every row has at least one.
        pooled: float (B, P) one vector per prompt, or None.
        fps: float (B,) frames per second of the pixels, or None.
        size: float (B, 2) pixel height and width, or None.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor | None = None
    fps: Tensor | None = None
    size: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def map(self, function) -> Condition:
        """The condition with `function` applied to every tensor in it."""
        changes = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in changes.items() if v is not None})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
        """Moved to `device`; floating tensors also cast to `dtype` when one is given."""
        return self.map(lambda v: v.to(device, dtype if v.is_floating_point() else None))

    def __getitem__(self, index: slice | Tensor | list[int]) -> Condition:
        """The conditions of some samples, by slice or by indices along B."""
        return self.map(lambda v: v[index])


def concatenate(conditions: list[Condition]) -> Condition:
    """Conditions joined along B; text is padded on the right to the longest S."""
    longest = max(c.tokens.shape[1] for c in conditions)

    def pad(value: Tensor) -> Tensor:
        missing = longest - value.shape[1]
        shape = (value.shape[0], missing, *value.shape[2:])
        return torch.cat([value, value.new_zeros(shape)], dim=1) if missing else value

    joined = {}
    for field in fields(Condition):
        values = [getattr(c, field.name) for c in conditions]
        if any(v is None for v in values):
            joined[field.name] = None
        elif field.name in ("tokens", "mask"):
            joined[field.name] = torch.cat([pad(v) for v in values])
        else:
            joined[field.name] = torch.cat(values)
    return Condition(**joined)
