"""RAFT, the optical flow of Teed and Deng 2020 (arXiv 2003.12039), the large model.

Names in the state dict are those of the authors' `raft-things.pth` (core/raft.py, extractor.py and
update.py of princeton-vl/RAFT), which VBench uses. Inference only: 20 updates, the flow at full
size of the last one. Nothing here reads files.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from opensora.errors import DataError

LEVELS, RADIUS = 4, 4
HIDDEN = CONTEXT = 128
SMALLEST_SIDE = 128
"""Features at an eighth are halved three times; the last level needs two points a side."""

Norm = type[nn.InstanceNorm2d] | type[nn.BatchNorm2d]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; `norm3` is `downsample[1]`, under both names in the state dict."""

    def __init__(self, before: int, after: int, norm: Norm, *, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, stride=stride)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.norm1, self.norm2 = norm(after), norm(after)
        self.downsample: nn.Module | None = None
        if stride > 1:
            self.norm3 = norm(after)
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride), self.norm3)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        y = functional.relu(self.norm2(self.conv2(y)))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class Encoder(nn.Module):
    """Pictures to features at an eighth of their size."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        self.norm1 = norm(64)
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3)
        widths = ((64, 64, 1), (64, 96, 2), (96, 128, 2))
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                ResidualBlock(before, after, norm, stride=stride),
                ResidualBlock(after, after, norm, stride=1),
            )
            for before, after, stride in widths
        )
        self.conv2 = nn.Conv2d(128, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm1(self.conv1(x)))  # (B, 64, H/2, W/2)
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))  # (B, channels, H/8, W/8)


class MotionEncoder(nn.Module):
    """Correlations and flow -> what the recurrent unit is told about motion."""

    def __init__(self):
        super().__init__()
        self.convc1 = nn.Conv2d(LEVELS * (2 * RADIUS + 1) ** 2, 256, 1)
        self.convc2 = nn.Conv2d(256, 192, 3, padding=1)
        self.convf1 = nn.Conv2d(2, 128, 7, padding=3)
        self.convf2 = nn.Conv2d(128, 64, 3, padding=1)
        self.conv = nn.Conv2d(64 + 192, 128 - 2, 3, padding=1)

    def forward(self, flow: Tensor, correlations: Tensor) -> Tensor:
        c = functional.relu(self.convc2(functional.relu(self.convc1(correlations))))
        f = functional.relu(self.convf2(functional.relu(self.convf1(flow))))
        return torch.cat([functional.relu(self.conv(torch.cat([c, f], 1))), flow], 1)


class SeparableGRU(nn.Module):
    """A gated recurrent unit of 1x5, then of 5x1 convolutions (Section 3.3)."""

    def __init__(self, inputs: int):
        super().__init__()
        for suffix, kernel, padding in (("1", (1, 5), (0, 2)), ("2", (5, 1), (2, 0))):
            for gate in "zrq":
                conv = nn.Conv2d(HIDDEN + inputs, HIDDEN, kernel, padding=padding)
                self.add_module(f"conv{gate}{suffix}", conv)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        for suffix in "12":
            z, r, q = (self.get_submodule(f"conv{gate}{suffix}") for gate in "zrq")
            both = torch.cat([state, x], 1)
            update, reset = torch.sigmoid(z(both)), torch.sigmoid(r(both))
            candidate = torch.tanh(q(torch.cat([reset * state, x], 1)))
            state = (1 - update) * state + update * candidate
        return state


class FlowHead(nn.Module):
    """The state of the recurrent unit -> a change of the flow."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(HIDDEN, 256, 3, padding=1)
        self.conv2 = nn.Conv2d(256, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(functional.relu(self.conv1(x)))


class UpdateBlock(nn.Module):
    """One step: motion features, recurrent unit, change of flow and mask of the upsampling."""

    def __init__(self):
        super().__init__()
        self.encoder = MotionEncoder()
        self.gru = SeparableGRU(CONTEXT + 128)
        self.flow_head = FlowHead()
        self.mask = nn.Sequential(
            nn.Conv2d(HIDDEN, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 64 * 9, 1)
        )

    def forward(self, state: Tensor, context: Tensor, correlations: Tensor, flow: Tensor) -> Tensor:
        """The next state."""
        motion = self.encoder(flow, correlations)
        return self.gru(state, torch.cat([context, motion], 1))


class RAFT(nn.Module):
    """Two pictures -> the flow from the first to the second."""

    def __init__(self):
        super().__init__()
        self.fnet = Encoder(256, nn.InstanceNorm2d)
        self.cnet = Encoder(HIDDEN + CONTEXT, nn.BatchNorm2d)
        self.update_block = UpdateBlock()

    @torch.no_grad()
    def forward(self, first: Tensor, second: Tensor, *, updates: int = 20) -> Tensor:
        """Flow in pixels, float32 (B, 2, H, W): x and y, padding included.

        Args:
            first, second: float (B, 3, H, W) in 0..255; sides are padded to multiples of 8 with
                copies of the edges, and the flow of the padding is given too, as VBench takes it.

        Raises:
            DataError: a side is shorter than 128.
        """
        first, second = (2 * (padded(x) / 255.0) - 1.0 for x in (first, second))
        both = self.fnet(torch.cat([first, second]))
        pyramid = correlation_pyramid(*both.float().chunk(2))
        state, context = self.cnet(first).split([HIDDEN, CONTEXT], dim=1)
        state, context = torch.tanh(state), torch.relu(context)
        grid = coordinates(state)
        places = grid
        for _ in range(updates):
            found = look_up(pyramid, places)
            state = self.update_block(state, context, found, places - grid)
            places = places + self.update_block.flow_head(state)
        mask = 0.25 * self.update_block.mask(state)
        return upsampled(places - grid, mask)


def padded(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) with sides that are multiples of 8, the edges repeated on both sides."""
    height, width = pictures.shape[-2:]
    if min(height, width) < SMALLEST_SIDE:
        raise DataError(
            f"pictures of {height}x{width} are too small for optical flow: RAFT needs sides of "
            f"{SMALLEST_SIDE} pixels"
        )
    down, across = -height % 8, -width % 8
    sides = (across // 2, across - across // 2, down // 2, down - down // 2)
    return functional.pad(pictures, sides, mode="replicate")


def coordinates(features: Tensor) -> Tensor:
    """Where each point lies, (B, 2, h, w): x, then y."""
    batch, _, height, width = features.shape
    y = torch.arange(height, device=features.device, dtype=torch.float32)
    x = torch.arange(width, device=features.device, dtype=torch.float32)
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows]).expand(batch, 2, height, width)


def correlation_pyramid(first: Tensor, second: Tensor) -> list[Tensor]:
    """Dot products of all pairs of points over sqrt(D), halved over the second's points.

    Args:
        first, second: float (B, D, h, w).

    Returns:
        LEVELS tensors (B * h * w, 1, h / 2^l, w / 2^l).
    """
    batch, depth, height, width = first.shape
    products = torch.einsum("bdn,bdm->bnm", first.flatten(2), second.flatten(2)) / depth**0.5
    level = products.reshape(batch * height * width, 1, height, width)
    pyramid = [level]
    for _ in range(LEVELS - 1):
        level = functional.avg_pool2d(level, 2)
        pyramid.append(level)
    return pyramid


def look_up(pyramid: list[Tensor], places: Tensor) -> Tensor:
    """Correlations around the places that points have moved to (equation 3).

    Bilinear, zero outside. The window's first index moves along x and its second along y: that is
    the order in which the published weights were trained.

    Args:
        places: float (B, 2, h, w) in points of the first level.

    Returns:
        float (B, LEVELS * 81, h, w).
    """
    batch, _, height, width = places.shape
    reach = torch.arange(-RADIUS, RADIUS + 1, device=places.device, dtype=places.dtype)
    window = torch.stack(torch.meshgrid(reach, reach, indexing="ij"), -1)  # (9, 9, 2)
    centres = places.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)  # (B h w, 1, 1, 2)
    found = []
    for number, level in enumerate(pyramid):
        size = torch.tensor([level.shape[3] - 1, level.shape[2] - 1], device=places.device)
        grid = 2 * (centres / 2**number + window) / size - 1
        taken = functional.grid_sample(level, grid, align_corners=True)  # (B h w, 1, 9, 9)
        found.append(taken.reshape(batch, height, width, -1))
    return torch.cat(found, -1).permute(0, 3, 1, 2).contiguous()


def upsampled(flow: Tensor, mask: Tensor) -> Tensor:
    """Flow at eight times the size: convex combinations of 3x3 neighbours (Section 3.3).

    Args:
        flow: float (B, 2, h, w); mask: float (B, 576, h, w).

    Returns:
        float (B, 2, 8h, 8w), eight times as long.
    """
    batch, _, height, width = flow.shape
    shares = torch.softmax(mask.view(batch, 1, 9, 8, 8, height, width), dim=2)
    around = functional.unfold(8 * flow, 3, padding=1).view(batch, 2, 9, 1, 1, height, width)
    mixed = (shares * around).sum(2)  # (B, 2, 8, 8, h, w)
    return mixed.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, 8 * height, 8 * width)
