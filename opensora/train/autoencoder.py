"""The task of a VAE: reconstruct clips from latents that a diffusion model will find easy.

Latents are standardised per channel over the batch between encoder and decoder, and the decoder
learns under noise of random strength, so that what a generator gets slightly wrong still decodes
well (noise augmentation, as in Rombach et al.'s successors and Ho et al. 2021, "Cascaded Diffusion
Models").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from opensora import runtime, zoo
from opensora.config import Config
from opensora.runtime import Runtime
from opensora.train.standardise import standardise
from opensora.train.tasks import StepLoss, Sums, Task
from opensora.types import VideoBatch
from opensora.vae.causal import CausalVAE, CausalVAEConfig
from opensora.vae.losses import AutoencoderLoss, AutoencoderLossConfig

_MEMORY = 0.05
"""Weight of the newest statistics in the running ones, which serve until `finish` measures."""


class AutoencoderConfig(Config):
    """Train a VAE on clips."""

    kind: Literal["autoencoder"] = "autoencoder"
    vae: zoo.VAEConfig = CausalVAEConfig()
    loss: AutoencoderLossConfig = AutoencoderLossConfig()
    latent_noise: float = Field(
        default=0.6, ge=0, description="decoder noise: a sample's strength is uniform up to this"
    )
    clip_frames: int | None = Field(
        default=None,
        ge=1,
        description="train on random windows of this many frames; None takes all",
    )
    sample_posterior: bool = Field(
        default=False,
        description="draw latents from the posterior; needed where loss.kl counts",
    )


class Autoencoder(Task):
    """Holds the VAE as `vae` and the loss, which may have a discriminator, as `criterion`.

    Args:
        whole_batch: whether each forward sees a rank's whole batch. Then the latents are
            standardised over the batches of all ranks; otherwise over each micro-batch alone,
            because ranks may have different numbers of them.
    """

    def __init__(self, config: AutoencoderConfig, *, seed: int, whole_batch: bool = True):
        super().__init__()
        self.config, self.seed, self.whole_batch = config, seed, whole_batch
        self.vae: CausalVAE = zoo.build_vae(config.vae)
        self.criterion = AutoencoderLoss(config.loss)
        self._statistics: list[tuple[Tensor, Tensor]] = []

    def tokens(self, batch: VideoBatch) -> int:
        _, frames, height, width = self.vae.latent_shape(*batch.pixels.shape[2:])
        return len(batch) * frames * height * width

    def shape(self, batch: VideoBatch) -> dict[str, Any]:
        frames, height, width = batch.pixels.shape[2:]
        fps = float(batch.fps[0])
        return {"num_frames": frames, "height": height, "width": width, "fps": fps}

    def forward(self, batch: VideoBatch, step: int) -> StepLoss:
        pixels = self._window(batch, step)  # B 3 F H W
        mean, log_variance = self.vae.posterior(pixels)  # B C T H W
        latents, ids = mean, batch.sample_ids
        if self.config.sample_posterior:
            spread = runtime.noise(mean.shape[1:], ids, self.seed, "posterior", step)
            latents = mean + (0.5 * log_variance).exp() * spread.to(mean.device)
        latents, mean_of_batch, std = standardise(latents, shared=self.whole_batch)
        self._statistics.append((mean_of_batch.detach(), std.detach()))
        if self.config.latent_noise:
            strength = runtime.uniform(ids, self.seed, "strength", step) * self.config.latent_noise
            noise = runtime.noise(mean.shape[1:], ids, self.seed, "noise", step)
            noise = noise * strength.view(-1, 1, 1, 1, 1)
            latents = latents + noise.to(latents.device, latents.dtype)
        loss, metrics = self.criterion(
            self.vae.reconstruct(latents), pixels, mean, log_variance, step
        )
        count = loss.new_tensor(float(len(batch)))
        sums = {name: (value * count, count) for name, value in metrics.items()}
        sums["loss"] = (loss.detach().sum(), count)
        return StepLoss(loss.sum(), count, loss.detach(), sums)

    def _window(self, batch: VideoBatch, step: int) -> Tensor:
        pixels = batch.pixels.to(self.vae.latent_mean.device)
        length, total = self.config.clip_frames, batch.pixels.shape[2]
        if length is None or length >= total:
            return pixels
        draw = runtime.uniform(batch.sample_ids, self.seed, "window", step)[:, 0]
        starts = (draw * (total - length + 1)).long().tolist()
        return torch.stack([p[:, s : s + length] for p, s in zip(pixels, starts, strict=True)])

    @torch.no_grad()
    def decided(self, *, accepted: bool) -> None:
        """Move the running statistics of the latents, if the step was made."""
        for mean, std in self._statistics if accepted else ():
            self.vae.latent_mean.lerp_(mean, _MEMORY)
            self.vae.latent_std.lerp_(std, _MEMORY)
        self._statistics.clear()

    @torch.no_grad()
    def validation(self, batch: VideoBatch) -> Sums:
        """PSNR (dB, per clip) and L1 of the reconstruction of whole clips."""
        pixels = batch.pixels.to(self.vae.latent_mean.device)
        error = self.vae.decode(self.vae.encode(pixels)) - pixels
        psnr = -10 * torch.log10(error.square().mean(dim=(1, 2, 3, 4)) / 4)
        count = psnr.new_tensor(float(len(batch)))
        l1 = error.abs().mean(dim=(1, 2, 3, 4)).sum()
        return {"psnr": (psnr.sum(), count), "l1": (l1, count), "loss": (l1, count)}

    @torch.no_grad()
    def finish(self, batches: Iterable[VideoBatch], runtime: Runtime) -> None:
        """Measure the latents' mean and standard deviation per channel and store them."""
        sums = torch.zeros(3, self.vae.latent_channels, dtype=torch.float64)
        for batch in batches:
            latents, _ = self.vae.posterior(batch.pixels.to(self.vae.latent_mean.device))
            values = latents.cpu().double().transpose(0, 1).flatten(1)  # C N
            count = torch.full_like(sums[0], values.shape[1])
            sums += torch.stack([values.sum(1), values.square().sum(1), count])
        total, squares, count = runtime.all_reduce(sums)
        mean = total / count
        self.vae.latent_mean.copy_(mean)
        self.vae.latent_std.copy_((squares / count - mean.square()).clamp(min=1e-8).sqrt())
