"""The adversary of an autoencoder: a PatchGAN over space and time with hinge losses.

Both players' terms go into one loss and one backward: the generator's term sees the discriminator
with detached weights, the discriminator's term sees detached reconstructions, so that each
player's gradient reaches that player only.
"""

from __future__ import annotations

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from opensora.config import Config
from opensora.errors import UsageError
from opensora.ops.conv3d import CausalConv3d


class AdversarialConfig(Config):
    """The adversarial term. Open-Sora's deep-compression VAE used a weight of 0.05."""

    weight: float = Field(default=0.05, gt=0, description="factor on the generator's term")
    start: int = Field(default=0, ge=0, description="the step from which the players play")
    width: int = Field(default=64, ge=1, description="channels of the discriminator's first layer")
    depth: int = Field(
        default=3, ge=1, description="layers that halve the picture; the widths double"
    )


class PatchDiscriminator(nn.Module):
    """Scores of overlapping patches of a video (Isola et al. 2017, section 3.2, with time added).

    Norms act on single positions, so a score depends on its patch only. Time is halved with every
    layer but the first; a clip may have any number of frames.

    Args:
        width: channels of the first layer; they double up to eight times that.
        depth: layers that halve height and width.
    """

    def __init__(self, *, width: int = 64, depth: int = 3):
        super().__init__()
        self.smallest_side = 2**depth
        widths = [3, *(width * min(2**i, 8) for i in range(depth))]
        self.convolutions = nn.ModuleList(
            CausalConv3d(widths[i], widths[i + 1], stride=(1 if i == 0 else 2, 2, 2))
            for i in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(w, eps=1e-6) for w in widths[2:])
        self.head = CausalConv3d(widths[-1], 1)

    def forward(self, videos: Tensor) -> Tensor:
        """Videos (B, 3, F, H, W) in [-1, 1] -> scores (B, F', H', W'), high for real ones.

        Raises:
            UsageError: for pictures that cannot be halved `depth` times.
        """
        if min(videos.shape[-2:]) < self.smallest_side:
            height, width = videos.shape[-2:]
            raise UsageError(
                f"the discriminator needs sides of at least {self.smallest_side} pixels, found "
                f"{height}x{width}: lower its depth or train on larger pictures"
            )
        x = rearrange(videos, "b c f h w -> b f h w c")
        for number, convolution in enumerate(self.convolutions):
            x = convolution(x)
            if number:
                x = self.norms[number - 1](x)
            x = functional.leaky_relu(x, 0.2)
        return self.head(x).squeeze(-1)


def generator_term(discriminator: nn.Module, fakes: Tensor) -> Tensor:
    """What the generator minimises, (B,): minus the mean score of its videos.

    Its gradient reaches `fakes` and never the discriminator's parameters.
    """
    frozen = {name: p.detach() for name, p in discriminator.named_parameters()}
    scores: Tensor = functional_call(discriminator, frozen, (fakes,))
    return -scores.flatten(1).mean(dim=1)


def discriminator_term(discriminator: nn.Module, fakes: Tensor, reals: Tensor) -> Tensor:
    """What the discriminator minimises, (B,): the hinge loss (Lim & Ye 2017, equation 13).

    Its gradient reaches the discriminator's parameters and never `fakes`.
    """
    real, fake = (discriminator(videos.detach()).flatten(1) for videos in (reals, fakes))
    return (functional.relu(1 - real) + functional.relu(1 + fake)).mean(dim=1) / 2


def idle_term(discriminator: nn.Module) -> Tensor:
    """Zero, through every parameter of the discriminator.

    Keeps data-parallel reducers, which wait for every parameter's gradient, from waiting forever
    while the discriminator does not play yet.
    """
    return torch.stack([0.0 * p.sum() for p in discriminator.parameters()]).sum()
