"""Less memory for a pipeline, as a config; `infer.placing` does it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from opensora.config import Config
from opensora.vae.tiling import VAE, TilingConfig, decode_tiled


class DecodeConfig(Config):
    """How latents become frames."""

    tile: bool | Literal["auto"] = Field(
        default="auto",
        description="in overlapping tiles, in memory that does not grow with the picture; equal to "
        "the whole up to the edges of tiles (`vae.tiling`); auto: where memory is not there for "
        "the whole, nor for one latent frame at a time (`infer.choices`)",
    )
    chunk: int | None = Field(
        default=None,
        ge=1,
        description="latent frames at a time, exactly; None: all, or with tile auto one where "
        "memory asks for it",
    )
    tiling: TilingConfig = TilingConfig()


class SavingsConfig(Config):
    """What is done so that a video fits a device."""

    offload: bool = Field(
        default=False, description="weights wait on the host and come when they are needed"
    )
    ahead: int = Field(default=1, ge=1, description="blocks that offload fetches in advance")
    quantize: Literal["none", "int8", "fp8"] = Field(
        default="none", description="weights of the blocks; needs the extra `quantize`"
    )
    decode: DecodeConfig = DecodeConfig()

    @model_validator(mode="after")
    def _used(self) -> SavingsConfig:
        if self.ahead != 1 and not self.offload:
            raise ValueError(f"ahead is {self.ahead}, but nothing is fetched: set offload")
        return self


def decode(vae: VAE, latents: Tensor, config: DecodeConfig) -> Tensor:
    """Normalised latents (B, C, T, h, w) -> pixels (B, 3, F, H, W) in [-1, 1].

    Here nothing is known of memory: auto is the whole.
    """
    if config.tile is True:
        return decode_tiled(vae, latents, tiling=config.tiling, chunk=config.chunk)
    return vae.decode(latents, chunk=config.chunk)
