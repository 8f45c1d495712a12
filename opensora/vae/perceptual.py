"""LPIPS: the distance of two pictures in the features of a VGG-16 (Zhang et al. 2018).

Weights are read from local files in the public layouts: torchvision's `vgg16` and the `vgg` heads
of the `lpips` package, version 0.1. Nothing is downloaded. The formula was checked against
`lpips/lpips.py` of richzhang/PerceptualSimilarity.
"""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import torch
from einops import rearrange
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from opensora.config import Config
from opensora.errors import UsageError

VGG_WIDTHS: tuple[tuple[int, ...], ...] = (
    (64, 64),
    (128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (512, 512, 512),
)
"""Channels of VGG-16's convolutions; each stage but the last is followed by a 2x2 max-pooling."""

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_SMALLEST_SIDE = 2 ** (len(VGG_WIDTHS) - 1)


class PerceptualConfig(Config):
    """The perceptual term and where its two weight files lie."""

    weight: float = Field(default=0.5, gt=0, description="factor on LPIPS averaged over the frames")
    vgg: str = Field(description="torchvision's vgg16 weights, .safetensors or .pth")
    heads: str = Field(description="the lpips package's v0.1/vgg weights, .safetensors or .pth")


class PerceptualDistance(nn.Module):
    """LPIPS with VGG-16, frozen; random until weights are loaded.

    Differences of unit-length features are squared, weighted by channel, averaged over the
    picture and summed over the five stages (Zhang et al. 2018, equation 1).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self):
        super().__init__()
        widths = [3, *(width for stage in VGG_WIDTHS for width in stage)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise(widths)
        )
        self.heads = nn.ParameterList(torch.rand(stage[-1]) for stage in VGG_WIDTHS)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def features(self, pictures: Tensor) -> list[Tensor]:
        """The last ReLU of each stage, float32, scaled to unit length along channels.

        Args:
            pictures: float (N, 3, H, W) in [-1, 1].
        """
        convolutions = iter(self.convolutions)
        x = (pictures - self.shift) / self.scale
        found = []
        for number, stage in enumerate(VGG_WIDTHS):
            if number:
                x = functional.max_pool2d(x, 2)
            for _ in stage:
                x = functional.relu(next(convolutions)(x))
            # In float32, because the distance is a difference of nearly equal numbers. The small
            # number is inside the root, or features that are all zero have no gradient but NaN.
            exact = x.float()
            found.append(exact * (exact.square().sum(dim=1, keepdim=True) + 1e-10).rsqrt())
        return found

    def forward(self, pictures: Tensor, references: Tensor) -> Tensor:
        """Distances (N,) of pictures from references, each float (N, 3, H, W) in [-1, 1].

        The references need no gradient.

        Raises:
            UsageError: for pictures that VGG cannot halve four times.
        """
        if min(pictures.shape[-2:]) < _SMALLEST_SIDE:
            height, width = pictures.shape[-2:]
            raise UsageError(
                f"LPIPS needs sides of at least {_SMALLEST_SIDE} pixels, found {height}x{width}: "
                "train on larger pictures or drop the perceptual term"
            )
        with torch.no_grad():
            expected = self.features(references)
        total = torch.zeros(len(pictures), device=pictures.device)
        for ours, theirs, head in zip(self.features(pictures), expected, self.heads, strict=True):
            weighted = (ours - theirs).square() * head.view(-1, 1, 1)
            total = total + weighted.sum(dim=1).mean(dim=(1, 2))
        return total

    def of_videos(self, videos: Tensor, references: Tensor) -> Tensor:
        """Mean distance over the frames, (B,), of videos (B, 3, F, H, W)."""
        frames = [rearrange(v, "b c f h w -> (b f) c h w") for v in (videos, references)]
        return self(*frames).unflatten(0, (len(videos), -1)).mean(dim=1)


def load_perceptual(*, vgg: str | Path, heads: str | Path) -> PerceptualDistance:
    """LPIPS with the weights of two local files.

    Args:
        vgg: state dict with torchvision's names, `features.0.weight` ... `features.28.bias`.
        heads: state dict with lpips' names, `lin0.model.1.weight` ... `lin4.model.1.weight`.

    Raises:
        UsageError: a file is absent or unreadable, or lacks a tensor or has it in another shape.
    """
    trunk, rows = _read(vgg, "torchvision's vgg16"), _read(heads, "the lpips package's vgg heads")
    network = PerceptualDistance()
    wanted: dict[str, Tensor] = {}
    for name, convolution in zip(_vgg_names(), network.convolutions, strict=True):
        for kind, parameter in convolution.named_parameters():
            wanted[f"{name}.{kind}"] = parameter
    _copy(trunk, wanted, vgg)
    views = {f"lin{i}.model.1.weight": h.view(1, -1, 1, 1) for i, h in enumerate(network.heads)}
    _copy(rows, views, heads)
    return network


def _vgg_names() -> list[str]:
    """Torchvision's names: convolution, ReLU, ... and a pooling are counted in one sequence."""
    names, position = [], 0
    for stage in VGG_WIDTHS:
        names += [f"features.{position + 2 * i}" for i in range(len(stage))]
        position += 2 * len(stage) + 1
    return names


def _read(path: str | Path, what: str) -> dict[str, Tensor]:
    path = Path(path).expanduser()
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{path} cannot be read ({reason}): the perceptual term needs {what} as a local "
            ".safetensors or .pth file"
        ) from error


def _copy(found: dict[str, Tensor], wanted: dict[str, Tensor], path: str | Path) -> None:
    for name, target in wanted.items():
        if not isinstance(found, dict) or name not in found:
            raise UsageError(f"{path} has no tensor '{name}': it is not the state dict expected")
        if found[name].shape != target.shape:
            raise UsageError(
                f"{path}: '{name}' has the shape {tuple(found[name].shape)}, "
                f"{tuple(target.shape)} is expected"
            )
        target.copy_(found[name])
