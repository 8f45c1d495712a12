"""Prompts to frames: encode the text, walk the schedule, decode the latents.

Each sample has its own seed and nothing else random, so what it looks like does not depend on the
batch that it is computed in. Frames may be given (`conditions`); long videos are drawn by `long`
with the parts of a pipeline that have names of their own here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from opensora import runtime, zoo
from opensora.data.transforms import to_uint8
from opensora.diffusion import guidance, objective, schedule, timesteps
from opensora.diffusion.guidance import Guide, Hide
from opensora.diffusion.process import Process, per_frame
from opensora.diffusion.samplers import SAMPLERS
from opensora.engine import checkpoint
from opensora.engine.interface import load_weights
from opensora.errors import CheckpointError, UsageError
from opensora.infer import choices
from opensora.infer.caching.applied import applied
from opensora.infer.choices import out_of_memory, shares_a_call
from opensora.infer.conditions import Given, begin
from opensora.infer.parallel import Team
from opensora.infer.savings import DecodeConfig, SavingsConfig, decode
from opensora.infer.settings import Names, Sample, SamplingConfig, Seed, Shape, settle
from opensora.memory import free_bytes
from opensora.types import Condition
from opensora.vae.causal import CausalVAE
from opensora.zoo import GeneratorConfig

if TYPE_CHECKING:
    from opensora.text.encoders import AnyTextEncoder
    from opensora.text.features import CachedEncoder


Callback = Callable[[int, Tensor, Tensor], None]
Fresh = Callable[[int], Tensor]


class VideoPipeline:
    """A denoiser with its text encoder and VAE, ready to draw.

    Attributes:
        shape: what the model was trained on, the default of a call.
        fingerprint: digest of the weights, for records.
        weaker: a worse one for the same latents, to guide away from (autoguidance); None guides
            away from the null text.
        team: other ranks that draw the same videos; None draws alone.
        savings: how latents become frames, and what has been done for less memory.
        budget: bytes that drawing may take beside the weights; None: what is free.
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
        self.weaker: VideoPipeline | None = None
        self.team: Team | None = None
        self.savings = SavingsConfig()
        self.budget: float | None = None

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
        if self.weaker is not None:
            self.weaker.to(device, dtype)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: Sequence[Seed] | None = None,
        shape: Shape | None = None,
        sampling: SamplingConfig | None = None,
        negative_prompt: str = "",
        given: Sequence[Sequence[Given]] | None = None,
        callback: Callback | None = None,
        **names: Unpack[Names],
    ) -> list[Sample]:
        """Draw one video for each prompt, as one batch.

        Args:
            prompts: one or several.
            seeds: a number, or a generator on the CPU, for each prompt; 0, 1, 2 ... by default.
            shape: pixel frames, height, width, fps; the trained shape by default.
            given: for each prompt, the frames that are there already.
            callback: (step, latents, data estimate) after every step; what it raises cancels.
            names: arguments as diffusers calls them: num_frames, height, width, fps,
                num_inference_steps, guidance_scale, generator.

        Raises:
            UsageError: the shape does not fit the VAE and the model, or frames do not fit it.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        shape, sampling, drawn = settle(shape or self.shape, sampling or SamplingConfig(), names)
        if drawn is not None and seeds is not None:
            raise UsageError("seeds and generator both say what is drawn: give one of them")
        seeds = drawn or (list(range(len(prompts))) if seeds is None else list(seeds))
        for name, values in (("seeds", seeds), ("lists of given frames", given)):
            if values is not None and len(values) != len(prompts):
                raise UsageError(f"{len(prompts)} prompts need as many {name}, found {len(values)}")
        latent_shape = self.latent_shape(shape)

        def noise(*step: int) -> Tensor:
            drawn = [_noise(latent_shape, seed, *step) for seed in seeds]
            return torch.stack(drawn).to(self.device)

        guided = sampling.guidance.scale != 1 and sampling.guidance.batched is not False
        with out_of_memory(self, "denoising", shape, len(prompts), calls=1 + guided):
            latents = self.draw_latents(
                noise(),
                prompts,
                shape,
                sampling,
                negative_prompt,
                given or [()] * len(prompts),
                callback,
                fresh=noise,
            )
        with out_of_memory(self, "decoding", shape, len(prompts)):
            pixels = decode(self.vae, latents, self.decoding(shape, len(prompts)))
        rows = zip(prompts, seeds, to_uint8(pixels), strict=True)
        return [Sample(prompt, _number(seed), video, shape.fps) for prompt, seed, video in rows]

    def draw_latents(
        self,
        noise: Tensor,
        prompts: Sequence[str],
        shape: Shape,
        sampling: SamplingConfig,
        negative_prompt: str = "",
        given: Sequence[Sequence[Given]] = (),
        callback: Callback | None = None,
        fresh: Fresh | None = None,
    ) -> Tensor:
        """Latents of videos (B, C, T, H, W) from standard normal noise of the same shape.

        Args:
            fresh: step -> more noise of that shape, for solvers that renew it.
        """
        total = noise.shape[2]
        if not any(given):
            levels = self.levels(sampling, shape, total)
            guide = self.guide(prompts, shape, sampling, negative_prompt, len(levels) - 1)
            return self.walk(guide, noise, levels, sampling, callback, fresh)
        c, t, h, w = noise.shape[1:]
        start = begin(self.vae, given, (c, t, h, w), self.device)
        levels = self.levels(sampling, shape, total, given=start.given)
        levels = schedule.held(levels, start.levels)

        def hide(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            hidden = start.given.to(x.device)
            return torch.where(per_frame(hidden), noise, x), t.masked_fill(hidden, 1.0)

        guide = self.guide(prompts, shape, sampling, negative_prompt, len(levels) - 1, hide=hide)
        first = levels[0].to(noise).expand(len(noise), -1)
        x = self.process.corrupt(start.latents, noise, first)
        return self.walk(guide, x, levels, sampling, callback, fresh)

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

    @property
    def free(self) -> float:
        """Bytes that drawing may take."""
        return free_bytes(self.device) if self.budget is None else self.budget

    def decoding(self, shape: Shape, rows: int, *, tiled: bool | None = None) -> DecodeConfig:
        """How `rows` videos of a shape are decoded now; `tiled` as in `choices.decoding`."""
        assert self.config.vae is not None, "a pipeline has a VAE"
        size, asked = self.latent_shape(shape), self.savings.decode
        return choices.decoding(self.config.vae, size, rows, asked, self.free, tiled=tiled)

    def levels(
        self, sampling: SamplingConfig, shape: Shape, total: int, *, given: Tensor | None = None
    ) -> Tensor:
        """The schedule of `total` latent frames: (steps + 1, T), or with B before T as `given`."""
        return schedule.matrix(
            sampling.schedule, total, shift=self.shift(shape, total), given=given
        )

    def shift(self, shape: Shape, total: int) -> float:
        """How far levels of `total` latent frames are shifted towards noise."""
        _, _, height, width = self.latent_shape(shape)
        _, down, across = self.config.model.patch
        return timesteps.shift_for(
            self.config.timesteps.shift,
            num_frames=total,
            tokens_per_frame=(height // down) * (width // across),
        )

    def guide(
        self,
        prompts: Sequence[str],
        shape: Shape,
        sampling: SamplingConfig,
        negative_prompt: str,
        num_steps: int,
        *,
        hide: Hide | None = None,
    ) -> Guide:
        """The guided data estimate of a batch.

        Raises:
            UsageError: guidance by frames, of which none are given, or beside a weaker model.
        """
        if sampling.guidance.frames_scale != 1 and (hide is None or self.weaker is not None):
            raise UsageError(
                f"guidance.frames_scale is {sampling.guidance.frames_scale}: it needs given "
                "frames, and no weaker model to guide by"
            )
        weaker = None
        if self.weaker is not None:
            told = self.weaker._condition(list(prompts), shape)
            worse = self.weaker.process.denoiser(partial(self.weaker._predict, team=self.team))
            weaker = lambda x, t, _: worse(x, t, told)  # noqa: E731
        cond = self._condition(list(prompts), shape)
        options = sampling.guidance.model_dump()
        if options["batched"] == "auto":
            branches = 3 if sampling.guidance.frames_scale != 1 else 2
            rows, words = branches * len(cond), cond.tokens.shape[1]
            size, model = self.latent_shape(shape), self.config.model
            options["batched"] = shares_a_call(model, size, rows, words, self.free)
        return guidance.classifier_free(
            self.process.denoiser(partial(self._predict, team=self.team)),
            cond,
            self._condition([negative_prompt], shape),
            hide=hide,
            weaker=weaker,
            num_steps=num_steps,
            spread=self.team.spread if self.team is not None and self.team.branches else None,
            **options,
        )

    def walk(
        self,
        guide: Guide,
        x: Tensor,
        levels: Tensor,
        sampling: SamplingConfig,
        callback: Callback | None = None,
        fresh: Fresh | None = None,
    ) -> Tensor:
        """Latents moved from the levels of the first row to those of the last."""

        def told(step: int, x: Tensor, data: Tensor) -> None:
            guide.after(guide.step)  # counted on where a guide is walked with more than once
            if cache is not None:
                cache.tick()
            if callback is not None:
                callback(step, x, data)

        sampler = SAMPLERS[sampling.sampler]
        with applied(self.model, sampling.cache) as cache:
            return sampler(guide, x, levels.to(x), process=self.process, callback=told, noise=fresh)

    def _predict(self, x: Tensor, t: Tensor, condition: Any, *, team: Team | None) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
            if team is not None:
                return team.run(self.model, x, t, condition).float()
            return self.model(x, t, condition).float()

    def _condition(self, prompts: list[str], shape: Shape) -> Condition:
        text = self.text.encode(prompts)
        count = len(prompts)
        fps = torch.full((count,), shape.fps)
        size = torch.tensor([[shape.height, shape.width]]).float().expand(count, 2)
        return Condition(text.tokens, text.mask, text.pooled, fps, size).to(self.device)


def _noise(shape: tuple[int, ...], seed: Seed, *step: int) -> Tensor:
    """Standard normal latents of one sample: those that it starts from, or those of a step."""
    if isinstance(seed, torch.Generator):
        return torch.randn(shape, generator=seed)
    return torch.randn(shape, generator=runtime.generator(seed, "sample", *step))


def _number(seed: Seed) -> int:
    return seed if isinstance(seed, int) else seed.initial_seed()
