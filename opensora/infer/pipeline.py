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

from opensora.diffusion import guidance, objective, schedule, timesteps
from opensora.diffusion.guidance import Guide, Hide
from opensora.diffusion.process import Process, per_frame
from opensora.diffusion.samplers import SAMPLERS
from opensora.errors import NumericsError, UsageError
from opensora.infer import choices, loading
from opensora.infer.caching.applied import applied
from opensora.infer.calls import (
    Names,
    Words,
    frames_of,
    number_of,
    settle,
    standard_normal,
    told_of_steps,
)
from opensora.infer.choices import out_of_memory, shares_a_call
from opensora.infer.conditions import Given, begin
from opensora.infer.parallel import Team
from opensora.infer.savings import DecodeConfig, SavingsConfig, decode
from opensora.infer.settings import Sample, Samples, SamplingConfig, Seed, Shape, check_fit
from opensora.memory import free_bytes
from opensora.types import Condition
from opensora.vae.causal import CausalVAE
from opensora.zoo import GeneratorConfig

if TYPE_CHECKING:
    from opensora.text.encoders import AnyTextEncoder
    from opensora.text.features import CachedEncoder


Callback = Callable[[int, Tensor, Tensor], Tensor | None]
Fresh = Callable[[int], Tensor]


class _Interrupted(Exception):
    """The rest of the steps is not wanted."""

    def __init__(self, latents: Tensor):
        super().__init__()
        self.latents = latents


class VideoPipeline:
    """A denoiser with its text encoder and VAE, ready to draw.

    Attributes:
        shape: what the model was trained on, the default of a call.
        fingerprint: digest of the weights, for records.
        weaker: a worse one for the same latents, to guide away from (autoguidance); None guides
            away from the null text.
        team: other ranks that draw the same videos; None draws alone.
        savings: how latents become frames, and what has been done for less memory.
        interrupt: set between two steps, ends a call, which gives the data estimate of that step;
            `_interrupt` is diffusers' name of it.
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
        self.interrupt = False

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, averaged: bool = True, torch_dtype: torch.dtype | None = None
    ) -> VideoPipeline:
        """Load a checkpoint of text-to-video training.

        Args:
            path: a run, its checkpoints folder, or one checkpoint.
            averaged: use the EMA weights where the checkpoint has them.
            torch_dtype: as `dtype` in `to`; weights stay float32.

        Raises:
            CheckpointError: missing, damaged, or of another task.
        """
        return cls(**loading.parts(path, averaged=averaged)).to(dtype=torch_dtype)

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self.interrupt = value

    def to(
        self,
        device: str | torch.device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> VideoPipeline:
        """Move to a device; `dtype` is the arithmetic of the denoiser (autocast)."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        self.device = self.device if device is None else torch.device(device)
        self.dtype = dtype or self.dtype
        if self.savings.offload:
            raise UsageError("weights of this pipeline wait on the host: `infer.placing.place` it")
        for part in (self.model, self.text, self.vae):
            part.to(self.device)
        if self.weaker is not None:
            self.weaker.to(device, dtype)
        return self

    def encode_prompt(self, prompts: str | Sequence[str]) -> Condition:
        """The features of texts, which a call takes as `prompt_embeds`."""
        return self.text.encode([prompts] if isinstance(prompts, str) else list(prompts))

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        seeds: Sequence[Seed] | None = None,
        shape: Shape | None = None,
        sampling: SamplingConfig | None = None,
        negative_prompt: str | Sequence[str] = "",
        given: Sequence[Sequence[Given]] | None = None,
        callback: Callback | None = None,
        **names: Unpack[Names],
    ) -> Samples:
        """Draw one video for each prompt, as one batch.

        Args:
            prompts: one or several.
            seeds: a number, or a generator, for each prompt; 0, 1, 2 ... by default.
            shape: pixel frames, height, width, fps; the trained shape by default.
            negative_prompt: one for all, or one for each.
            given: for each video, the frames that are there already.
            callback: (step, latents, data estimate) after every step; latents that it returns go
                on, and what it raises cancels.
            names: arguments as diffusers calls them (`calls.Names`).

        Raises:
            UsageError: the shape does not fit the VAE and the model, or frames do not fit it.
        """
        call = settle(
            prompts, seeds, shape or self.shape, sampling or SamplingConfig(), negative_prompt,
            names,
        )  # fmt: skip
        shape, sampling, count = call.shape, call.sampling, len(call.words)
        if given is not None and len(given) != count:
            raise UsageError(
                f"{count} prompts need as many lists of given frames, found {len(given)}"
            )
        size = self.latent_shape(shape)
        if call.noise is not None and call.noise.shape != (count, *size):
            raise UsageError(f"latents are {tuple(call.noise.shape)}; they are {(count, *size)}")
        told = told_of_steps(self, names, self.levels(sampling, shape, size[1]))
        if told is not None and callback is not None:
            raise TypeError("a pipeline takes callback or callback_on_step_end, not both")
        self.interrupt = False

        def noise(*step: int) -> Tensor:
            drawn = [standard_normal(size, seed, *step).to(self.device) for seed in call.seeds]
            return torch.stack(drawn)

        guided = sampling.guidance.scale != 1 and sampling.guidance.batched is not False
        with out_of_memory(self.device, self.savings, "denoising", shape, count, calls=1 + guided):
            latents = self.draw_latents(
                noise() if call.noise is None else call.noise.to(self.device).float(),
                call.words,
                shape,
                sampling,
                call.negative,
                given or [()] * count,
                callback or told,
                fresh=noise,
            )
        if call.output == "latent":
            drawn = list(latents)
        else:
            with out_of_memory(self.device, self.savings, "decoding", shape, count):
                pixels = decode(self.vae, latents, self.decoding(shape, count))
            drawn = frames_of(pixels, call.output)
        rows = zip(call.prompts, call.seeds, drawn, strict=True)
        return Samples(Sample(p, number_of(seed), video, shape.fps) for p, seed, video in rows)

    def draw_latents(
        self,
        noise: Tensor,
        prompts: Words,
        shape: Shape,
        sampling: SamplingConfig,
        negative_prompt: str | Words = "",
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
            Misfit: the shape does not divide into the VAE's strides and the model's patches.
        """
        size = (shape.num_frames, shape.height, shape.width)
        check_fit(*size, stride=self.vae.stride, patch=self.config.model.patch)
        return self.vae.latent_shape(*size)

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
        prompts: Words,
        shape: Shape,
        sampling: SamplingConfig,
        negative_prompt: str | Words,
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
            if isinstance(prompts, Condition):
                raise UsageError("a weaker model reads prompts itself: give prompts, not features")
            told = self.weaker._condition(prompts, shape)
            worse = self.weaker.process.denoiser(partial(self.weaker._predict, team=self.team))
            weaker = lambda x, t, _: worse(x, t, told)  # noqa: E731
        cond = self._condition(prompts, shape)
        null = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
        options = sampling.guidance.model_dump()
        if options["batched"] == "auto":
            branches = 3 if sampling.guidance.frames_scale != 1 else 2
            rows, words = branches * len(cond), cond.tokens.shape[1]
            size, model = self.latent_shape(shape), self.config.model
            fits = shares_a_call(model, size, rows, words, self.free)
            options["batched"] = fits if self.team is None else self.team.agree(fits, self.device)
        return guidance.classifier_free(
            self.process.denoiser(partial(self._predict, team=self.team)),
            cond,
            self._condition(null, shape),
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
        """Latents moved from the levels of the first row to those of the last.

        Raises:
            NumericsError: the model gave numbers that are not finite, which pixels would hide.
        """

        def told(step: int, x: Tensor, data: Tensor) -> Tensor | None:
            guide.after(guide.step)  # counted on where a guide is walked with more than once
            if cache is not None:
                cache.tick()
            changed = None if callback is None else callback(step, x, data)
            if self.interrupt:
                raise _Interrupted(data if changed is None else changed)
            return changed

        sampler = SAMPLERS[sampling.sampler]
        with applied(self.model, sampling.cache) as cache:
            try:
                x = sampler(
                    guide, x, levels.to(x), process=self.process, callback=told, noise=fresh
                )
            except _Interrupted as ended:
                return ended.latents
        broken = int((~x.isfinite()).flatten(1).any(dim=1).sum())
        if broken:
            narrow = self.dtype == torch.float16
            raise NumericsError(
                f"{broken} of {len(x)} videos came out of the denoiser with values that are no "
                "finite numbers: "
                + ("float16 overflows, use bf16 or fp32" if narrow else "its weights have diverged")
            )
        return x

    def _predict(self, x: Tensor, t: Tensor, condition: Any, *, team: Team | None) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
            if team is not None:
                return team.run(self.model, x, t, condition).float()
            return self.model(x, t, condition).float()

    def _condition(self, words: Words, shape: Shape) -> Condition:
        text = words if isinstance(words, Condition) else self.text.encode(list(words))
        channels, pooled = self.config.model.text_channels, self.config.model.pooled_channels
        if text.tokens.shape[-1] != channels or (pooled and text.pooled is None):
            raise UsageError(
                f"features of texts have {text.tokens.shape[-1]} channels, and the model needs "
                f"{channels}{' and a pooled vector' * bool(pooled)}: use `encode_prompt`"
            )
        count = len(text)
        fps = torch.full((count,), shape.fps)
        size = torch.tensor([[shape.height, shape.width]]).float().expand(count, 2)
        return Condition(text.tokens, text.mask, text.pooled, fps, size).to(self.device)
