"""What can be built from a config: one literal table for each kind of part.

A new model is a file in its room and a line here. The tables are all there is: nothing registers
itself, and a checkpoint can name only what stands in them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from opensora.config import Config
from opensora.diffusion.flow import FlowConfig
from opensora.diffusion.objective import ObjectiveConfig
from opensora.diffusion.timesteps import LogitNormalConfig, TimestepConfig
from opensora.errors import UsageError
from opensora.models.mmdit import MMDiT, MMDiTConfig
from opensora.models.stdit import STDiT, STDiTConfig
from opensora.text import encoders
from opensora.text.encoders import AnyTextEncoder, TextConfig, TextEncoder
from opensora.text.words import WordsConfig
from opensora.vae.causal import CausalVAE, CausalVAEConfig

DENOISERS = {"stdit": STDiT, "mmdit": MMDiT}
VAES = {"causal": CausalVAE}

Denoiser = STDiT | MMDiT
DenoiserConfig = Annotated[STDiTConfig | MMDiTConfig, Field(discriminator="kind")]
VAEConfig = CausalVAEConfig


class GeneratorConfig(Config):
    """The parts that turn a prompt into a video: training adds to it, sampling reads it."""

    model: DenoiserConfig = STDiTConfig()
    text: TextConfig = Field(default=WordsConfig(), description="text encoder")
    vae: VAEConfig | None = Field(
        default=None, description="latent space; None takes the one of vae_from"
    )
    objective: ObjectiveConfig = Field(default=FlowConfig(), description="what the model predicts")
    timesteps: TimestepConfig = Field(
        default=LogitNormalConfig(), description="training levels; sampling uses the same shift"
    )


def build_vae(config: VAEConfig) -> CausalVAE:
    """The VAE that a config describes, with fresh weights."""
    return VAES[config.kind](config)


def build_text(config: TextConfig) -> AnyTextEncoder:
    """The text encoder that a config describes; pretrained ones are loaded."""
    return encoders.build(config)


def build_denoiser(config: DenoiserConfig, *, vae: CausalVAE, text: TextEncoder) -> Denoiser:
    """The denoiser for the latents of `vae` and the conditions of `text`.

    Raises:
        UsageError: when the text encoder's widths are not the ones the model is configured for.
    """
    for key, found in (
        ("text_channels", text.channels),
        ("pooled_channels", text.pooled_channels),
    ):
        wanted = getattr(config, key)
        if wanted != found and not (key == "pooled_channels" and wanted == 0):
            raise UsageError(
                f"model.{key} is {wanted}, but the text encoder gives {found}: set "
                f"model.{key}={found}"
            )
    return DENOISERS[config.kind](config, in_channels=vae.latent_channels)
