"""The task of a latent video generator: predict at addressed noise levels, frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from opensora import runtime, zoo
from opensora.diffusion import masks, objective, timesteps
from opensora.diffusion.masks import MaskConfig
from opensora.engine import checkpoint
from opensora.engine.deferred import recording
from opensora.engine.flops import FlopCounter, rehearsal
from opensora.engine.interface import load_weights
from opensora.engine.sequence import SequenceParallel
from opensora.errors import CheckpointError, UsageError
from opensora.text.encoders import AnyTextEncoder
from opensora.text.features import CachedEncoder
from opensora.train.tasks import StepLoss, Sums, Task
from opensora.types import Condition, LatentBatch, VideoBatch, concatenate
from opensora.vae.causal import CausalVAE
from opensora.zoo import GeneratorConfig

VALIDATION_LEVELS = 10


class TextToVideoConfig(GeneratorConfig):
    """Train a denoiser, and a text encoder that is made for it, on clips or cached latents."""

    kind: Literal["text_to_video"] = "text_to_video"
    vae_from: Path | None = Field(
        default=None, description="checkpoint or run of the VAE's training"
    )
    masks: MaskConfig = Field(default=MaskConfig(), description="frames given clean, by task")
    caption_dropout: float = Field(
        default=0.1, ge=0, le=1, description="share of captions left out"
    )


def load_vae(path: str | Path) -> CausalVAE:
    """The VAE of a checkpoint: of its own training, or the frozen part of a generator's.

    Raises:
        CheckpointError: when the checkpoint has no VAE.
    """
    folder = checkpoint.find(path)
    vae = zoo.build_vae(_vae_config(folder))
    if checkpoint.read_config(folder)["task"]["kind"] == "autoencoder":
        snapshot = checkpoint.load(folder, parts=("weights", "ema"))
        weights = checkpoint.prefixed(checkpoint.inference_weights(snapshot), "vae")
    else:
        weights = checkpoint.prefixed(checkpoint.load(folder, parts=("frozen",)).frozen, "vae")
    load_weights(vae, weights)
    return vae.eval().requires_grad_(False)


def _vae_config(folder: Path) -> zoo.VAEConfig:
    tree = checkpoint.read_config(folder)["task"]
    if tree.get("vae") is None:
        raise CheckpointError(f"{folder} has no VAE: its task is '{tree.get('kind')}'")
    return checkpoint.part_of_config(zoo.VAEConfig, tree["vae"], folder)


def resolve(config: TextToVideoConfig) -> TextToVideoConfig:
    """The config with the VAE's architecture written in.

    Raises:
        UsageError: `vae_from` is missing, or its VAE is not the `vae` of the config.
    """
    if config.vae_from is None:
        raise UsageError("task.vae_from is not set: name the run or checkpoint of a trained VAE")
    found = _vae_config(checkpoint.find(config.vae_from))
    if config.vae is not None and config.vae != found:
        raise UsageError(
            f"task.vae is another VAE than the one of task.vae_from={config.vae_from}: leave "
            "task.vae out"
        )
    return config.model_copy(update={"vae": found})


class TextToVideo(Task):
    """Holds the denoiser as `model` and, where it is trained along, the text encoder as `text`.

    The VAE and a pretrained text encoder are used but not held: they go where the task goes and
    are no part of its state.

    Args:
        deferred: build the denoiser on the meta device, for an engine that fills it.
    """

    def __init__(
        self,
        config: TextToVideoConfig,
        *,
        vae: CausalVAE,
        text: AnyTextEncoder,
        seed: int,
        deferred: bool = False,
    ):
        super().__init__()
        self.config, self.seed = config, seed
        if deferred:
            with recording() as self.recipe:
                self.model = zoo.build_denoiser(config.model, vae=vae, text=text)
            self.recipe.serves(self.model)
        else:
            self.model = zoo.build_denoiser(config.model, vae=vae, text=text)
        self.process = objective.build(config.objective)
        self.sequence = SequenceParallel()
        # Frozen parts stay out of the module tree: they are neither optimised nor averaged.
        self._frozen: dict[str, Any] = {"vae": vae}
        if text.trainable:
            self.text = text
        else:
            self._frozen["text"] = CachedEncoder(text)

    def _apply(self, fn: Any, recurse: bool = True) -> TextToVideo:
        """Frozen parts follow the task to its device; a model without weights stays behind."""
        for part in (*self._frozen.values(), *self.children()):
            if part is not self.model or self.recipe is None:
                part._apply(fn, recurse)
        return self

    @property
    def vae(self) -> CausalVAE:
        return self._frozen["vae"]

    @property
    def text_encoder(self) -> AnyTextEncoder | CachedEncoder:
        """What turns captions into conditions: `text`, or a frozen encoder that remembers."""
        encoder: CachedEncoder | None = self._frozen.get("text")
        return self.text if encoder is None else encoder

    def latent_identity(self, cached: dict[str, Any]) -> dict[str, Any]:
        """The identity that a cache of latents for this task has to carry.

        Args:
            cached: what the cache carries. Text features in it count where the text encoder is
                frozen; one that trains along makes its own.
        """
        identity = {"vae": checkpoint.identity(self.vae.state_dict())}
        if "text" in cached:
            frozen = "text" in self._frozen
            identity["text"] = self.text_encoder.identity() if frozen else cached["text"]
        return identity

    def frozen(self) -> dict[str, Tensor]:
        return {f"vae.{name}": value for name, value in self.vae.state_dict().items()}

    def tokens(self, batch: LatentBatch | VideoBatch) -> int:
        shape = self._latent_shape(batch)
        if not self.sequence.counts:
            return 0
        frames = self.sequence.frames(shape[1], self._degree(shape))
        return len(batch) * (frames.stop - frames.start) * self._tokens_per_frame(shape)

    def sharing(self, batch: LatentBatch | VideoBatch) -> int:
        return self._degree(self._latent_shape(batch)) * self.sequence.copies

    def _degree(self, latent_shape: tuple[int, ...]) -> int:
        """How many ranks share a clip; in validation all that may."""
        if not self.training:
            return self.sequence.most
        return self.sequence.degree(latent_shape[1] * self._tokens_per_frame(latent_shape))

    def shape(self, batch: LatentBatch | VideoBatch) -> dict[str, Any]:
        _, frames, height, width = self._latent_shape(batch)
        time, down, across = self.vae.stride
        return {
            "num_frames": 1 + (frames - 1) * time,
            "height": height * down,
            "width": width * across,
            "fps": float(batch.fps[0]),
        }

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.model.blocks

    @torch.no_grad()
    def flops(self, batch: LatentBatch | VideoBatch) -> int:
        trained = "text" not in self._frozen
        with FlopCounter() as text:
            cond = self.condition(batch, [False] * len(batch))
        with rehearsal(self.device) as (counter, stand_in), torch.enable_grad():
            latents = torch.empty(len(batch), *self._latent_shape(batch))
            if isinstance(batch, VideoBatch):
                with torch.no_grad():
                    zoo.build_vae(self.vae.config).encode(stand_in(batch.pixels).to(self.device))
            # Where the text is trained, its features ask for gradients as they do in the step.
            given = cond.map(stand_in)
            given = replace(given, tokens=given.tokens.requires_grad_(trained))
            model = zoo.build_denoiser(self.config.model, vae=self.vae, text=self.text_encoder)
            model(latents, torch.empty(latents.shape[0], latents.shape[2]), given).sum().backward()
        return counter.total // self.sharing(batch) + text.total * (3 if trained else 1)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.x_embedder.weight.device

    def forward(self, batch: LatentBatch | VideoBatch, step: int) -> StepLoss:
        latents = self.latents(batch)  # B C T H W
        frames, ids = latents.shape[2], batch.sample_ids
        self.sequence.check_same(ids, self._degree(tuple(latents.shape[1:])), self.device)
        draw = lambda purpose, count=1: runtime.uniform(  # noqa: E731
            ids, self.seed, purpose, step, count=count
        )
        given = masks.draw(draw("mask", masks.num_uniforms(frames)), frames, self.config.masks)
        levels = timesteps.draw(
            draw("level", timesteps.num_uniforms(self.config.timesteps, frames)),
            self.config.timesteps,
            num_frames=frames,
            tokens_per_frame=self._tokens_per_frame(tuple(latents.shape[1:])),
        ).masked_fill(given, 0.0)
        noise = runtime.noise(latents.shape[1:], ids, self.seed, "noise", step)
        dropped = draw("caption")[:, 0] < self.config.caption_dropout
        cond = self.condition(batch, dropped.tolist())
        device = latents.device
        loss, frames = self._loss(latents, noise.to(device), levels.to(device), cond)  # B T
        counts = (~given[:, frames]).to(device, loss.dtype)
        per_sample = (loss * counts).sum(1) / counts.sum(1).clamp(min=1)
        total = (loss * counts).sum()
        metrics = {"loss": (total.detach(), counts.sum())}
        return StepLoss(total, counts.sum(), per_sample.detach(), metrics)

    def _loss(
        self, latents: Tensor, noise: Tensor, levels: Tensor, cond: Condition
    ) -> tuple[Tensor, slice]:
        """(B, T) of this rank's frames, and which those are."""
        degree = self._degree(tuple(latents.shape[1:]))
        frames = self.sequence.frames(latents.shape[2], degree)
        return self.loss_at(latents, noise, levels, cond, degree), frames

    def loss_at(
        self, latents: Tensor, noise: Tensor, levels: Tensor, cond: Condition, degree: int
    ) -> Tensor:
        """The loss (B, T) of this rank's frames where `degree` ranks share each clip.

        Args:
            latents, noise: (B, C, T, H, W) of whole clips.
            levels: (B, T).
        """
        frames = self.sequence.frames(latents.shape[2], degree)
        noisy = self.process.corrupt(latents, noise, levels)
        prediction = self.sequence.run(self.model, noisy, levels, cond, degree)
        data, noise = latents[:, :, frames], noise[:, :, frames]
        return self.process.loss_per_frame(prediction, data, noise, levels[:, frames])

    @torch.no_grad()
    def validation(self, batch: LatentBatch | VideoBatch) -> Sums:
        """The loss at equidistant levels on fixed noise, overall and by level."""
        latents = self.latents(batch)
        cond = self.condition(batch, [False] * len(batch))
        noise = runtime.noise(latents.shape[1:], batch.sample_ids, self.seed, "validation")
        sums: Sums = {}
        for k in range(VALIDATION_LEVELS):
            level = (k + 0.5) / VALIDATION_LEVELS
            levels = torch.full((len(batch), latents.shape[2]), level, device=latents.device)
            loss, _ = self._loss(latents, noise.to(latents.device), levels, cond)
            pair = (loss.sum(), loss.new_tensor(float(loss.numel())))
            sums[f"loss/level_{level:.2f}"] = pair
            before = sums.get("loss", (loss.new_zeros(()), loss.new_zeros(())))
            sums["loss"] = (before[0] + pair[0], before[1] + pair[1])
        return sums

    @torch.no_grad()
    def latents(self, batch: LatentBatch | VideoBatch) -> Tensor:
        """Normalised latents of a batch on the model's device."""
        if isinstance(batch, LatentBatch):
            return batch.latents.to(self.device)
        return self.vae.encode(batch.pixels.to(self.device))

    def condition(self, batch: LatentBatch | VideoBatch, dropped: list[bool]) -> Condition:
        """Text features and clip facts, with some captions replaced by the null text."""
        texts = [None if gone else text for text, gone in zip(batch.texts, dropped, strict=True)]
        cond = self._text_features(texts, getattr(batch, "features", None))
        shape = self.shape(batch)
        size = torch.tensor([[shape["height"], shape["width"]]]).expand(len(batch), 2)
        fps, size = batch.fps.to(self.device), size.to(self.device, torch.float32)
        return Condition(cond.tokens, cond.mask, cond.pooled, fps=fps, size=size).to(self.device)

    def _text_features(self, texts: list[str | None], cached: Condition | None) -> Condition:
        """Features of captions; those of a frozen encoder come from the cache where it has them."""
        if cached is None or "text" not in self._frozen:
            return self.text_encoder.encode(texts)
        if None not in texts:
            return cached
        null = self.text_encoder.encode([None]).to("cpu")
        rows = [null if text is None else cached[[row]] for row, text in enumerate(texts)]
        return concatenate(rows)

    def _latent_shape(self, batch: LatentBatch | VideoBatch) -> tuple[int, int, int, int]:
        if isinstance(batch, LatentBatch):
            c, t, h, w = batch.latents.shape[1:]
            return c, t, h, w
        return self.vae.latent_shape(*batch.pixels.shape[2:])

    def _tokens_per_frame(self, latent_shape: tuple[int, ...]) -> int:
        _, down, across = self.config.model.patch
        return (latent_shape[2] // down) * (latent_shape[3] // across)
