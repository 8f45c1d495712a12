"""What an autoencoder is trained to minimise, term by term, sample by sample.

Terms are means over a sample's own values, so that weights mean the same at every resolution and
length. All of them are zero for a perfect reconstruction whose posterior is the prior, except the
adversarial ones.
"""

from __future__ import annotations

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from opensora.config import Config
from opensora.vae.discriminator import (
    AdversarialConfig,
    PatchDiscriminator,
    discriminator_term,
    generator_term,
    idle_term,
)
from opensora.vae.perceptual import PerceptualConfig, PerceptualDistance, load_perceptual


class AutoencoderLossConfig(Config):
    """Weights of the terms; a term of weight zero is not computed, except KL, which is measured.

    Stacks that sum the reconstruction over pixels and KL over latents (latent diffusion,
    Rombach et al. 2022) count KL against one pixel value: their weight w is w * (latent positions
    / pixel values) here, w / 768 for a 4x8x8 autoencoder.
    """

    l1: float = Field(default=1.0, ge=0, description="mean absolute error of pixels in [-1, 1]")
    l2: float = Field(default=0.0, ge=0, description="mean squared error")
    laplacian: float = Field(
        default=0.0, ge=0, description="mean absolute error of the detail of 3 scales"
    )
    kl: float = Field(default=1e-6, ge=0, description="nats per latent position")
    perceptual: PerceptualConfig | None = Field(default=None, description="LPIPS")
    adversarial: AdversarialConfig | None = Field(
        default=None, description="PatchGAN with hinge losses"
    )

    @model_validator(mode="after")
    def _reconstructs(self) -> AutoencoderLossConfig:
        if not self.l1 + self.l2:
            raise ValueError("l1 and l2 are both 0: give one a weight, or nothing sets the colours")
        return self


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) in nats, (B,).

    Summed over the channels of a latent position and averaged over the positions.

    Args:
        mean, log_variance: float (B, C, T, H, W).
    """
    nats = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
    return nats.sum(dim=1).flatten(1).mean(dim=1)


def laplacian_distance(difference: Tensor, *, scales: int = 3) -> Tensor:
    """How much detail differs, (B,): mean |band| summed over the bands of a Laplacian pyramid.

    The pyramid (Burt & Adelson 1983) is linear, hence that of the difference is the difference of
    the pyramids. Fine and coarse bands count alike, as in the Lap1 loss of Bojanowski et al. 2018,
    so that an edge counts for more than the few pixels that it covers.

    Args:
        difference: float (B, C, F, H, W), reconstruction minus pixels. Every frame for itself.
        scales: bands; fewer where the picture becomes smaller than 4 pixels.
    """
    x = rearrange(difference, "b c f h w -> (b c f) 1 h w")
    taps = x.new_tensor([1.0, 3.0, 3.0, 1.0]) / 8
    total = x.new_zeros(difference.shape[0])
    for _ in range(scales):
        if min(x.shape[-2:]) < 4:
            break
        # Four taps keep the coarse pixels in the middle of those they stand for, where bilinear
        # interpolation expects them.
        padded = functional.pad(x, (1, 1, 1, 1), mode="replicate")
        halved = functional.conv2d(padded, taps.view(1, 1, 4, 1), stride=(2, 1))
        halved = functional.conv2d(halved, taps.view(1, 1, 1, 4), stride=(1, 2))
        band = x - functional.interpolate(halved, size=x.shape[-2:], mode="bilinear")
        total = total + band.abs().unflatten(0, (len(total), -1)).flatten(1).mean(dim=1)
        x = halved
    return total


class AutoencoderLoss(nn.Module):
    """The weighted sum of the terms. Its parameters are the discriminator's.

    An optimizer has to be given them beside the autoencoder's; the one backward of the sum gives
    each player its own gradient.

    Raises:
        UsageError: the perceptual weights cannot be loaded.
    """

    def __init__(self, config: AutoencoderLossConfig):
        super().__init__()
        self.config = config
        # Out of the module tree: VGG is neither trained nor averaged nor saved.
        self._frozen: dict[str, PerceptualDistance] = {}
        if config.perceptual is not None:
            self._frozen["perceptual"] = load_perceptual(
                vgg=config.perceptual.vgg, heads=config.perceptual.heads
            )
        self.discriminator = None
        if config.adversarial is not None:
            self.discriminator = PatchDiscriminator(
                width=config.adversarial.width, depth=config.adversarial.depth
            )

    def forward(
        self, reconstruction: Tensor, pixels: Tensor, mean: Tensor, log_variance: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each sample and what it consists of.

        Args:
            reconstruction: float (B, 3, F, H, W), not clamped.
            pixels: float (B, 3, F, H, W) in [-1, 1].
            mean, log_variance: float (B, C, T, H, W), the posterior of raw latents.
            step: of the optimizer, for the adversary's start.

        Returns:
            float32 (B,), and each term's unweighted batch mean as a detached scalar.
        """
        reconstruction, pixels = reconstruction.float(), pixels.float()
        terms = self._fidelity(reconstruction, pixels)
        terms["kl"] = (self.config.kl, kl_to_standard_normal(mean.float(), log_variance.float()))
        terms |= self._adversarial(reconstruction, pixels, step)
        loss = pixels.new_zeros(len(pixels))
        for weight, term in terms.values():
            loss = loss + weight * term if weight else loss
        metrics = {name: term.detach().mean() for name, (_, term) in terms.items()}
        if self.discriminator is not None and "discriminator" not in terms:
            loss = loss + idle_term(self.discriminator)
        return loss, metrics

    def _fidelity(self, videos: Tensor, pixels: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Name -> (weight, term (B,)) of the terms that compare with the pixels."""
        config, difference = self.config, videos - pixels
        terms: dict[str, tuple[float, Tensor]] = {}
        if config.l1:
            terms["l1"] = (config.l1, difference.abs().flatten(1).mean(dim=1))
        if config.l2:
            terms["l2"] = (config.l2, difference.square().flatten(1).mean(dim=1))
        if config.laplacian:
            with torch.autocast(videos.device.type, enabled=False):
                terms["laplacian"] = (config.laplacian, laplacian_distance(difference))
        if config.perceptual is not None:
            distance = self._frozen["perceptual"].to(videos.device).of_videos(videos, pixels)
            terms["perceptual"] = (config.perceptual.weight, distance)
        return terms

    def _adversarial(
        self, videos: Tensor, pixels: Tensor, step: int
    ) -> dict[str, tuple[float, Tensor]]:
        """Name -> (weight, term (B,)) of both players, nothing before the start."""
        config, discriminator = self.config.adversarial, self.discriminator
        if config is None or discriminator is None or step < config.start:
            return {}
        return {
            "generator": (config.weight, generator_term(discriminator, videos)),
            "discriminator": (1.0, discriminator_term(discriminator, videos, pixels)),
        }
