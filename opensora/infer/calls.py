"""A call of the pipeline in words of its own or in diffusers', settled before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

from opensora import runtime
from opensora.config import validate
from opensora.data.transforms import to_uint8
from opensora.errors import UsageError, did_you_mean
from opensora.infer.settings import SamplingConfig, Seed, Shape
from opensora.media.picture import as_pil
from opensora.types import Condition

OutputType = Literal["uint8", "np", "pt", "pil", "latent"]
Words = Sequence[str] | Condition
"""Prompts, or the features of their texts."""

OWN = ("prompts", "seeds", "shape", "sampling", "negative_prompt", "given", "callback")
TENSORS = ("latents", "data")
"""What `callback_on_step_end` may see: x after the step, and the data estimate."""


class Names(TypedDict, total=False):
    """Arguments as diffusers' video pipelines call them; each goes over `shape` or `sampling`.

    Attributes:
        prompt: in the place of `prompts`.
        prompt_embeds, negative_prompt_embeds: what `encode_prompt` gives, or float (B, S, D)
            without padding, in the place of texts.
        num_videos_per_prompt: each with a seed of its own.
        generator: on any device; one for all, which draws one video after the other, or one each.
        latents: the noise to start from, float (B, C, T, h, w).
        output_type: of `Sample.frames`: uint8 (F, H, W, 3), the default; np, float32 of the same
            shape in [0, 1]; pt, float32 (F, 3, H, W) in [0, 1]; pil, a list of pictures; latent,
            float32 (C, T, h, w), not decoded.
        callback_on_step_end: called with (pipeline, step, level, tensors) after every step; the
            latents of the dictionary that it returns, if any, go on.
        callback_on_step_end_tensor_inputs: names of the tensors, of TENSORS.
    """

    prompt: str | Sequence[str]
    prompt_embeds: Condition | Tensor
    negative_prompt_embeds: Condition | Tensor
    num_frames: int
    height: int
    width: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    num_videos_per_prompt: int
    generator: torch.Generator | Sequence[torch.Generator]
    latents: Tensor
    output_type: OutputType
    callback_on_step_end: Callable[..., dict[str, Tensor] | None]
    callback_on_step_end_tensor_inputs: Sequence[str]


@dataclass(frozen=True)
class Call:
    """What is drawn, settled.

    Attributes:
        prompts: of each video; empty where only the features of its text are known.
        words: what the model is told, for each video.
        negative: of all of them, or of each.
        noise: to start from, or None.
    """

    prompts: list[str]
    words: Words
    negative: Words
    shape: Shape
    sampling: SamplingConfig
    seeds: list[Seed]
    noise: Tensor | None
    output: OutputType


def settle(
    prompts: str | Sequence[str] | None,
    seeds: Sequence[Seed] | None,
    shape: Shape,
    sampling: SamplingConfig,
    negative_prompt: str | Sequence[str],
    names: Names,
) -> Call:
    """A call with the named arguments laid over the others.

    Raises:
        TypeError: for another name, or for something that is said twice or not at all.
        UsageError: values that do not fit.
    """
    unknown = sorted(set(names) - set(Names.__annotations__))
    if unknown:
        hint = did_you_mean(unknown[0], [*Names.__annotations__, *OWN])
        raise TypeError(f"a pipeline takes no argument '{unknown[0]}'.{hint}")
    texts, words = _told(prompts, names)
    each = _positive(names.get("num_videos_per_prompt", 1), "num_videos_per_prompt")
    texts = [text for text in texts for _ in range(each)]
    words = texts if words is None else words[[k for k in range(len(words)) for _ in range(each)]]
    count = len(words)
    negative = _negative(negative_prompt, each, names)
    if len(negative) not in (1, count):
        raise UsageError(f"{count} videos need one negative prompt or as many, not {len(negative)}")
    if seeds is not None and "generator" in names:
        raise TypeError("a pipeline takes seeds or a generator, not both")
    drawn: list[Seed] = list(range(count)) if seeds is None else list(seeds)
    given = names.get("generator")
    if given is not None:
        drawn = [given] * count if isinstance(given, torch.Generator) else list(given)
    if len(drawn) != count:
        raise UsageError(f"{count} prompts need as many seeds, found {len(drawn)}")
    output = names.get("output_type", "uint8")
    if output not in get_args(OutputType):
        hint = did_you_mean(str(output), get_args(OutputType))
        raise UsageError(f"output_type {output!r} is unknown.{hint}")
    sizes = {k: v for k, v in names.items() if k in ("num_frames", "height", "width", "fps")}
    return Call(
        texts or [""] * count,
        words,
        negative,
        replace(shape, **sizes),  # type: ignore[arg-type]
        _sampling(sampling, names),
        drawn,
        names.get("latents"),
        output,
    )


def _sampling(sampling: SamplingConfig, names: Names) -> SamplingConfig:
    tree = sampling.model_dump()
    if "num_inference_steps" in names:
        tree["schedule"]["num_steps"] = names["num_inference_steps"]
    if "guidance_scale" in names:
        tree["guidance"]["scale"] = names["guidance_scale"]
    return validate(SamplingConfig, tree, where="sampling")


def _told(prompts: str | Sequence[str] | None, names: Names) -> tuple[list[str], Condition | None]:
    """The prompts, or the features of their texts."""
    said = [value for value in (prompts, names.get("prompt")) if value is not None]
    if len(said) + ("prompt_embeds" in names) != 1:
        raise TypeError("a pipeline takes prompts (or prompt), or prompt_embeds, and one of them")
    if "prompt_embeds" in names:
        return [], _features(names["prompt_embeds"])
    return ([said[0]] if isinstance(said[0], str) else list(said[0])), None


def _negative(negative_prompt: str | Sequence[str], each: int, names: Names) -> Words:
    if "negative_prompt_embeds" in names:
        return _features(names["negative_prompt_embeds"])
    if isinstance(negative_prompt, str):
        return [negative_prompt]
    return [text for text in negative_prompt for _ in range(each)]


def _features(value: Condition | Tensor) -> Condition:
    if isinstance(value, Condition):
        return value
    if value.dim() != 3:
        raise UsageError(f"prompt_embeds are (B, S, D), found {tuple(value.shape)}")
    return Condition(value, torch.ones(value.shape[:2], dtype=torch.bool, device=value.device))


def _positive(value: int, name: str) -> int:
    if value < 1:
        raise UsageError(f"{name} is {value}; it is at least 1")
    return value


def told_of_steps(
    pipeline: Any, names: Names, levels: Tensor
) -> Callable[[int, Tensor, Tensor], Tensor | None] | None:
    """`callback_on_step_end` as a sampler calls it back.

    Args:
        levels: (steps + 1, T), of which the highest before a step is told.

    Raises:
        UsageError: tensors that it cannot see, or see without a callback.
    """
    inner = names.get("callback_on_step_end")
    wanted = names.get("callback_on_step_end_tensor_inputs", ("latents",))
    for name in wanted:
        if name not in TENSORS:
            hint = did_you_mean(name, TENSORS)
            raise UsageError(f"callback_on_step_end_tensor_inputs has '{name}'.{hint}")
    if inner is None:
        if "callback_on_step_end_tensor_inputs" in names:
            raise UsageError("callback_on_step_end_tensor_inputs needs callback_on_step_end")
        return None

    def told(step: int, x: Tensor, data: Tensor) -> Tensor | None:
        tensors = {"latents": x, "data": data}
        level = levels[step].max()
        found = inner(pipeline, step, level, {name: tensors[name] for name in wanted}) or {}
        return found.get("latents")

    return told


def standard_normal(shape: tuple[int, ...], seed: Seed, *step: int) -> Tensor:
    """Latents of one sample: those that it starts from, or those of a step."""
    if isinstance(seed, torch.Generator):
        return torch.randn(shape, generator=seed, device=seed.device)
    return torch.randn(shape, generator=runtime.generator(seed, "sample", *step))


def number_of(seed: Seed) -> int:
    """The seed as a record has it."""
    return seed if isinstance(seed, int) else seed.initial_seed()


def frames_of(pixels: Tensor, output: OutputType) -> list[Any]:
    """Pixels (B, 3, F, H, W) in [-1, 1] as frames of each video."""
    frames = to_uint8(pixels)  # B F H W 3
    if output == "uint8":
        return list(frames)
    if output == "pil":
        return [[as_pil(frame) for frame in video] for video in frames]
    unit = (pixels.float() * 0.5 + 0.5).clamp(0, 1)
    if output == "pt":
        return list(unit.transpose(1, 2))
    return list(unit.permute(0, 2, 3, 4, 1).cpu().numpy())
