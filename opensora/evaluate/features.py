"""Networks that turn videos into vectors, and how pixels are prepared for them.

`i3d` is the one whose Frechet distance is called FVD. The three conventions of preparing its
pixels in public code give different numbers for the same videos, so the convention is always named
beside the number. The only file here that imports transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu

from opensora.config import Config
from opensora.errors import UsageError, require
from opensora.runtime import generator

Convention = Literal["stylegan_v", "common_metrics", "cdfvd"]
Extractor = Callable[[Tensor], Tensor]
"""uint8 videos (B, F, H, W, 3) -> features (B, D)."""

I3D_SIDE = 224
I3D_FEWEST = 10
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class ExtractorConfig(Config):
    """Which network, where its weights lie, and how pixels are prepared."""

    kind: Literal["i3d", "videomae", "vjepa2", "clip", "random_conv3d"] = Field(
        default="random_conv3d",
        description="i3d is FVD's; random_conv3d needs no weights and gives `rfvd`, no FVD",
    )
    path: str | None = Field(
        default=None,
        description="i3d: TorchScript file; videomae, vjepa2, clip: folder or hub repository",
    )
    convention: Convention = Field(
        default="common_metrics",
        description="stylegan_v: the i3d file resizes itself; common_metrics: short side and "
        "centre crop; cdfvd: stretched to a square",
    )
    side: int = Field(default=64, ge=16, description="pixels of a side, of random_conv3d")
    channels: int = Field(default=64, ge=2, description="features of random_conv3d")

    @model_validator(mode="after")
    def _fits(self) -> ExtractorConfig:
        if (self.path is None) != (self.kind == "random_conv3d"):
            need = "takes no path" if self.path else "needs extractor.path, its weights"
            raise ValueError(f"extractor {self.kind} {need}")
        if self.convention == "stylegan_v" and self.kind != "i3d":
            raise ValueError("the convention stylegan_v is of the i3d file alone")
        if self.kind != "random_conv3d" and (self.side, self.channels) != (64, 64):
            raise ValueError("side and channels are of random_conv3d alone")
        return self

    @property
    def metric(self) -> str:
        """What the Frechet distance on these features is called."""
        names = {"i3d": "fvd", "random_conv3d": "rfvd"}
        return names.get(self.kind, f"fvd_{self.kind}")


def build(config: ExtractorConfig, device: torch.device, num_frames: int) -> Extractor:
    """The network of a config, on a device.

    Raises:
        UsageError: its weights cannot be read, or it takes no videos of this length.
        MissingPackageError: transformers is absent.
    """
    return EXTRACTORS[config.kind](config, device, num_frames)


def square(videos: Tensor, side: int, convention: Convention) -> Tensor:
    """uint8 (B, F, H, W, 3) -> float32 (B, 3, F, side, side) in [0, 1], bilinear, no antialiasing.

    common_metrics: the short side becomes `side`, the long one is rounded up, and the centre is
    cut out (JunyaoHu/common_metrics_on_video_quality, after VideoGPT). cdfvd: both sides become
    `side` whatever the proportions (songweige/content-debiased-fvd).
    """
    batch, frames, height, width, _ = videos.shape
    x = videos.permute(0, 1, 4, 2, 3).flatten(0, 1).float() / 255  # (B F, 3, H, W)
    size = (side, side)
    if convention == "common_metrics":
        short = min(height, width)
        size = (-(-height * side // short), -(-width * side // short))
    x = interpolate(x, size, mode="bilinear", align_corners=False)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    x = x[:, :, top : top + side, left : left + side]
    return x.unflatten(0, (batch, frames)).transpose(1, 2)


def _i3d(config: ExtractorConfig, device: torch.device, num_frames: int) -> Extractor:
    """The I3D of StyleGAN-V as a TorchScript file; 400 logits before the softmax."""
    if num_frames < I3D_FEWEST:
        raise UsageError(f"i3d takes {I3D_FEWEST} frames or more, the clips have {num_frames}")
    assert config.path is not None
    try:
        network = torch.jit.load(Path(config.path).expanduser(), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).strip().splitlines() or ["it is no TorchScript file"])[-1]
        raise UsageError(f"extractor.path={config.path} cannot be read: {reason}") from None
    inside = config.convention == "stylegan_v"

    def extract(videos: Tensor) -> Tensor:
        if inside:
            pixels = videos.permute(0, 4, 1, 2, 3).float().contiguous()  # B C F H W in [0, 255]
        else:
            pixels = square(videos, I3D_SIDE, config.convention) * 2 - 1
        return network(pixels, rescale=inside, resize=inside, return_features=True)

    return extract


@dataclass(frozen=True)
class _Family:
    """How a kind of transformers model is called.

    Attributes:
        model: class; `argument` of its forward, `statistics` of its pixels: mean and deviation.
        whole: whether it takes videos, (B, F, 3, H, W), rather than frames.
    """

    model: str
    argument: str
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    whole: bool


_FAMILIES = {
    "videomae": _Family("VideoMAEModel", "pixel_values", _IMAGENET, True),
    "vjepa2": _Family("VJEPA2Model", "pixel_values_videos", _IMAGENET, True),
    "clip": _Family("CLIPVisionModelWithProjection", "pixel_values", _CLIP, False),
}


def _pretrained(config: ExtractorConfig, device: torch.device, num_frames: int) -> Extractor:
    """Token features averaged over space and time; of CLIP, image features over the frames."""
    family = _FAMILIES[config.kind]
    transformers: Any = require("transformers", extra="text", purpose=f"extractor {config.kind}")
    try:
        model: Any = getattr(transformers, family.model).from_pretrained(
            config.path, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or ["unreadable"])[0]
        raise UsageError(f"extractor.path={config.path} cannot be loaded: {reason}") from None
    model = model.to(device).eval()
    settings = model.config
    fixed = getattr(settings, "num_frames", None) if config.kind == "videomae" else None
    if fixed is not None and fixed != num_frames:
        raise UsageError(f"{config.path} takes {fixed} frames, the clips have {num_frames}")
    side = getattr(settings, "image_size", None) or settings.crop_size
    mean, deviation = (torch.tensor(v, device=device).view(3, 1, 1, 1) for v in family.statistics)

    def extract(videos: Tensor) -> Tensor:
        pixels = (square(videos, side, config.convention) - mean) / deviation
        pixels = pixels.transpose(1, 2).contiguous()  # B F 3 H W
        if not family.whole:
            images = model(**{family.argument: pixels.flatten(0, 1)}).image_embeds
            return images.unflatten(0, pixels.shape[:2]).mean(1)
        skip = {"skip_predictor": True} if config.kind == "vjepa2" else {}
        return model(**{family.argument: pixels}, **skip).last_hidden_state.mean(1)

    return extract


class RandomConv3d(nn.Module):
    """Four space-time convolutions with fixed random weights, and the mean and spread of the last.

    Without weights to download it tells sets of videos apart by appearance and motion; its
    numbers compare only among themselves.
    """

    def __init__(self, channels: int):
        super().__init__()
        widths = [3, channels // 2, channels // 2, channels // 2, channels // 2]
        self.layers = nn.ModuleList(
            nn.Conv3d(a, b, 3, stride=(1 if i % 2 else 2, 2, 2), padding=1)
            for i, (a, b) in enumerate(pairwise(widths))
        )
        chance = generator(0, "random conv3d")
        for parameter in self.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 0
            drawn = torch.randn(parameter.shape, generator=chance)
            parameter.data = drawn * ((2 / fan) ** 0.5 if fan else 0.1)
        self.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, F, H, W) in [-1, 1] -> (B, channels)."""
        for layer in self.layers:
            pixels = leaky_relu(layer(pixels), 0.2)
        flat = pixels.flatten(2)
        return torch.cat([flat.mean(2), flat.std(2, correction=0)], 1)


def _random(config: ExtractorConfig, device: torch.device, num_frames: int) -> Extractor:
    network = RandomConv3d(config.channels).to(device)
    return lambda videos: network(square(videos, config.side, config.convention) * 2 - 1)


EXTRACTORS: dict[str, Callable[[ExtractorConfig, torch.device, int], Extractor]] = {
    "i3d": _i3d,
    "videomae": _pretrained,
    "vjepa2": _pretrained,
    "clip": _pretrained,
    "random_conv3d": _random,
}
