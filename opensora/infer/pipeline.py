"""Prompts to frames: encode the text, walk the schedule, decode the latents.

Each sample has its own seed and nothing else random, so what it looks like does not depend on the
batch that it is computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from opensora import runtime, zoo
from opensora.config import Config
from opensora.diffusion import guidance, objective, schedule, timesteps
from opensora.diffusion.guidance import GuidanceConfig
from opensora.diffusion.process import Process
from opensora.diffusion.samplers import SAMPLERS
from opensora.diffusion.schedule import FullSequenceConfig, ScheduleConfig
from opensora.engine import checkpoint
from opensora.engine.interface import load_weights
from opensora.errors import CheckpointError, UsageError
from opensora.types import Condition
from opensora.vae.causal import CausalVAE
from opensora.zoo import GeneratorConfig

if TYPE_CHECKING:
    from opensora.text.encoders import AnyTextEncoder
    from opensora.text.features import CachedEncoder


class SamplingConfig(Config):
    """How a video is drawn."""

    sampler: Literal["euler", "heun", "dpmpp_2m", "ddim"] = Field(
        default="euler", description="solver"
    )
    schedule: ScheduleConfig = FullSequenceConfig(num_steps=30)
    guidance: GuidanceConfig = GuidanceConfig(scale=3.0)


@dataclass(frozen=True)
class Sample:
    """A finished video.

    Attributes:
        frames: uint8 (F, H, W, 3).
        fps: frames per second.
    """

    prompt: str
    seed: int
    frames: np.ndarray
    fps: float


@dataclass(frozen=True)
class Shape:
    """What to draw: pixel frames, height, width and frames per second."""

    num_frames: int
    height: int
    width: int
    fps: float


class VideoPipeline:
    """A denoiser with its text encoder and VAE, ready to draw.

    Attributes:
        shape: what the model was trained on, the default of a call.
        fingerprint: digest of the weights, for records.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        text: AnyTextEncoder | CachedEncoder,
        vae: CausalVAE,
        config: GeneratorConfig,
        shape: Shape,
        fingerprint: str = "",
    ):
        self.model, self.text, self.vae = model, text, vae
        self.config, self.shape, self.fingerprint = config, shape, fingerprint
        self.process: Process = objective.build(config.objective)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    @classmethod
    def from_pretrained(cls, path: str | Path, *, averaged: bool = True) -> VideoPipeline:
        """Load a checkpoint of text-to-video training.

        Args:
            path: a run, its checkpoints folder, or one checkpoint.
            averaged: use the EMA weights where the checkpoint has them.

        Raises:
            CheckpointError: missing, damaged, or of another task.
        """
        folder = checkpoint.find(path)
        tree = checkpoint.read_config(folder)["task"]
        if tree.get("kind") != "text_to_video":
            raise CheckpointError(
                f"{folder} is a checkpoint of '{tree.get('kind')}'; sampling needs 'text_to_video'"
            )
        parts = ("weights", "ema", "frozen") if averaged else ("weights", "frozen")
        snapshot = checkpoint.load(folder, parts=parts)
        known = {k: v for k, v in tree.items() if k in GeneratorConfig.model_fields}
        config = checkpoint.part_of_config(GeneratorConfig, known, folder)
        assert config.vae is not None, "a checkpoint's config is resolved"
        vae = zoo.build_vae(config.vae)
        text = zoo.build_text(config.text)
        model = zoo.build_denoiser(config.model, vae=vae, text=text)
        weights = checkpoint.inference_weights(snapshot, averaged=averaged)
        load_weights(vae, checkpoint.prefixed(snapshot.frozen, "vae"))
        load_weights(model, checkpoint.prefixed(weights, "model"))
        if text.trainable:
            load_weights(text, checkpoint.prefixed(weights, "text"))
        pipeline = cls(
            model=model.eval(),
            text=text.eval(),
            vae=vae.eval(),
            config=config,
            shape=Shape(**snapshot.progress["shape"]),
            fingerprint=checkpoint.identity({**weights, **snapshot.frozen}),
        )
        return pipeline

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> VideoPipeline:
        """Move to a device; `dtype` is the arithmetic of the denoiser (autocast)."""
        self.device = torch.device(device)
        self.dtype = dtype or self.dtype
        for part in (self.model, self.text, self.vae):
            part.to(self.device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        shape: Shape | None = None,
        sampling: SamplingConfig | None = None,
        negative_prompt: str = "",
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> list[Sample]:
        """Draw one video for each prompt, as one batch.

        Args:
            seeds: one for each prompt; 0, 1, 2 ... by default.
            shape: pixel frames, height, width, fps; the trained shape by default.
            callback: (step, latents, data estimate) after every step; what it raises cancels.

        Raises:
            UsageError: the shape does not fit the VAE and the model.
        """
        shape, sampling = shape or self.shape, sampling or SamplingConfig()
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        if len(seeds) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts need as many seeds, found {len(seeds)}")
        latent_shape = self.latent_shape(shape)
        x = torch.stack([_noise(latent_shape, seed) for seed in seeds]).to(self.device)
        latents = self._denoise(x, prompts, shape, sampling, negative_prompt, callback)
        pixels = self.vae.decode(latents)
        frames = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        frames = frames.permute(0, 2, 3, 4, 1).cpu().numpy()
        rows = zip(prompts, seeds, frames, strict=True)
        return [Sample(prompt, seed, video, shape.fps) for prompt, seed, video in rows]

    def latent_shape(self, shape: Shape) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a video.

        Raises:
            UsageError: the shape does not divide into the VAE's strides and the model's patches.
        """
        latent_shape = self.vae.latent_shape(shape.num_frames, shape.height, shape.width)
        _, down, across = self.config.model.patch
        if latent_shape[2] % down or latent_shape[3] % across:
            sides = (self.vae.stride[1] * down, self.vae.stride[2] * across)
            raise UsageError(
                f"a video of {shape.height}x{shape.width} does not fit the model: its sides must "
                f"be multiples of {sides[0]}x{sides[1]}"
            )
        return latent_shape

    def _denoise(
        self,
        x: Tensor,
        prompts: Sequence[str],
        shape: Shape,
        sampling: SamplingConfig,
        negative_prompt: str,
        callback: Callable[[int, Tensor, Tensor], None] | None,
    ) -> Tensor:
        frames = x.shape[2]
        _, down, across = self.config.model.patch
        tokens_per_frame = (x.shape[3] // down) * (x.shape[4] // across)
        shift = timesteps.shift_for(
            self.config.timesteps.shift, num_frames=frames, tokens_per_frame=tokens_per_frame
        )
        levels = schedule.matrix(sampling.schedule, frames, shift=shift)
        denoise = guidance.classifier_free(
            self.process.denoiser(self._predict),
            self._condition(list(prompts), shape),
            self._condition([negative_prompt], shape),
            **sampling.guidance.model_dump(),
        )
        sampler = SAMPLERS[sampling.sampler]
        return sampler(denoise, x, levels.to(x), process=self.process, callback=callback)

    def _predict(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
            return self.model(x, t, condition).float()

    def _condition(self, prompts: list[str], shape: Shape) -> Condition:
        text = self.text.encode(prompts)
        count = len(prompts)
        fps = torch.full((count,), shape.fps)
        size = torch.tensor([[shape.height, shape.width]]).float().expand(count, 2)
        return Condition(text.tokens, text.mask, text.pooled, fps, size).to(self.device)


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=runtime.generator(seed, "sample"))
