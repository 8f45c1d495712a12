"""Which frames are given. A given frame is at noise level 0 and takes no part in the loss.

`ends` and `every_other` say it for one clip; `draw` mixes the tasks for training, in the ratios of
the config, from uniform numbers that the caller addresses. At least one frame is never given.
"""

from __future__ import annotations

import pydantic
import torch
from pydantic import Field
from torch import Tensor

from opensora.config import Config
from opensora.errors import UsageError, did_you_mean

MASK_NAMES = (
    "identity",
    "quarter_random",
    "quarter_head",
    "quarter_tail",
    "quarter_head_tail",
    "image_random",
    "image_head",
    "image_tail",
    "image_head_tail",
    "interpolate",
    "random",
)

# Spellings in public configs, and the word for what most people mean by identity.
_ALIASES = {"intepolate": "interpolate", "none": "identity"}


class MaskConfig(Config):
    """How often each kind of mask is trained, as in Open-Sora's `mask_ratios`.

    image_* gives one frame, quarter_* a run of 1 to T / 4, head_tail that many at both ends,
    interpolate every other frame, random each frame with a probability between 0.1 and 0.9,
    identity none. What the ratios leave of 1 is identity.
    """

    ratios: dict[str, float] = Field(
        default_factory=dict, description="probability by name of the mask"
    )

    @pydantic.field_validator("ratios")
    @classmethod
    def _known_and_at_most_one(cls, ratios: dict[str, float]) -> dict[str, float]:
        named: dict[str, float] = {}
        for given_name, ratio in ratios.items():
            name = _ALIASES.get(given_name, given_name)
            if name not in MASK_NAMES:
                hint = did_you_mean(given_name, MASK_NAMES)
                raise ValueError(f"'{given_name}' is not a mask.{hint}")
            if name in named:
                raise ValueError(f"'{given_name}' and another spelling of it are both given")
            if not 0.0 <= ratio <= 1.0:
                raise ValueError(f"ratio of '{given_name}' is {ratio}; it lies in [0, 1]")
            named[name] = ratio
        total = sum(named.values())
        if total > 1 + 1e-9:
            raise ValueError(f"mask ratios sum to {total:g}; they may sum to at most 1")
        return named


def ends(num_frames: int, *, head: int = 0, tail: int = 0) -> Tensor:
    """The first `head` and the last `tail` frames are given: bool (T,).

    (0, 0) is text-to-video, (1, 0) image-to-video, (k, 0) extends forward, (0, k) backward, and
    (k, k) connects two clips; (1, 1) with the same image twice loops.

    Raises:
        UsageError: for negative counts, or when no frame is left to be made.
    """
    if head < 0 or tail < 0 or head + tail >= num_frames:
        raise UsageError(
            f"{head} frames at the head and {tail} at the tail are given of {num_frames}; counts "
            "are not negative and leave at least one frame"
        )
    frame = torch.arange(num_frames)
    return (frame < head) | (frame >= num_frames - tail)


def every_other(num_frames: int, *, start: int = 0) -> Tensor:
    """Frames start, start + 2, ... are given, to interpolate between them: bool (T,)."""
    if start not in (0, 1) or num_frames < 2:
        raise UsageError(
            f"interpolation starts at frame 0 or 1 of at least 2, not {start} of {num_frames}"
        )
    return torch.arange(num_frames) % 2 == start


def num_uniforms(num_frames: int) -> int:
    """How many uniform numbers `draw` takes for a sample of T latent frames."""
    return 3 + num_frames


def draw(u: Tensor, num_frames: int, config: MaskConfig) -> Tensor:
    """Training masks from uniform numbers.

    A sample's mask depends on its own row only: number 0 chooses the kind, 1 its size (or start,
    or probability), 2 its place, the others decide frame by frame in `random`. Runs are as in
    Open-Sora 1.2, except that clips under 8 latent frames are masked too, by runs of one frame.

    Args:
        u: float (B, num_uniforms(T)) in [0, 1), on the CPU, addressed by sample and step.
        num_frames: T latent frames.

    Returns:
        bool (B, T), True where a frame is given.
    """
    if u.ndim != 2 or u.shape[1] != num_uniforms(num_frames):
        raise ValueError(
            f"masks of {num_frames} frames need uniforms of shape (B, {num_uniforms(num_frames)}), "
            f"found {tuple(u.shape)}"
        )
    u = u.double()
    size_u, place_u, frame = u[:, 1:2], u[:, 2:3], torch.arange(num_frames)
    run = 1 + (size_u * max(1, num_frames // 4)).floor()  # (B, 1) frames
    one = torch.ones_like(run)

    def inside(length: Tensor) -> Tensor:
        first = (place_u * (num_frames - length + 1)).floor()
        return (frame >= first) & (frame < first + length)

    def head(length: Tensor) -> Tensor:
        return frame < length

    def tail(length: Tensor) -> Tensor:
        return frame >= num_frames - length

    masks = {
        "identity": torch.zeros(u.shape[0], num_frames, dtype=torch.bool),
        "quarter_random": inside(run),
        "quarter_head": head(run),
        "quarter_tail": tail(run),
        "quarter_head_tail": head(run) | tail(run),
        "image_random": inside(one),
        "image_head": head(one),
        "image_tail": tail(one),
        "image_head_tail": head(one) | tail(one),
        "interpolate": frame % 2 == (size_u >= 0.5),
        "random": u[:, 3:] < 0.1 + 0.8 * size_u,
    }
    chosen = _choose(u[:, 0].contiguous(), config)  # (B,)
    given = torch.stack([masks[name] for name in MASK_NAMES])[chosen, torch.arange(u.shape[0])]
    given[given.all(dim=1), -1] = False
    return given


def _choose(u: Tensor, config: MaskConfig) -> Tensor:
    """The position in MASK_NAMES that each uniform number falls on; identity takes the rest."""
    ratios = [config.ratios.get(name, 0.0) for name in MASK_NAMES[1:]]
    edges = torch.tensor(ratios, dtype=torch.float64).cumsum(0)
    position = torch.searchsorted(edges, u, right=True) + 1
    return torch.where(position < len(MASK_NAMES), position, 0)
