"""What a client asks for: fields -> a checked request with nothing left open.

JSON and multipart forms come through here alike. No field is a path or a URL, and there is none
for one; a field that is not known is refused rather than ignored.
"""

from __future__ import annotations

import json
import re
import secrets
import unicodedata
from dataclasses import dataclass
from typing import Any, NoReturn

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from opensora.errors import did_you_mean
from opensora.infer.pipeline import SamplingConfig, Shape, VideoPipeline
from opensora.infer.settings import Misfit
from opensora.serve.config import MAX_SEED, Bounds
from opensora.serve.refusals import Refusal, quoted

_SIZE = re.compile(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})")
_DIRECTIONS = set(range(0x202A, 0x202F)) | set(range(0x2066, 0x206A))
"""Code points that make text read in another order than it is written."""


class VideoFields(BaseModel):
    """The fields of POST /v1/videos; what is left out is as the model was trained."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(description="what to show")
    negative_prompt: str = Field(default="", description="what guidance leads away from")
    model: str | None = Field(default=None, description="id of the model, as /v1/models has it")
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="same seed, same video; drawn if left out"
    )
    steps: int = Field(default=30, ge=1, description="sampling steps")
    guidance_scale: float = Field(default=3.0, ge=0, description="1 is off")
    num_frames: int | None = Field(default=None, ge=1, description="frames")
    seconds: float | None = Field(
        default=None, gt=0, description="length, in place of num_frames; rounded down to what fits"
    )
    size: str | None = Field(default=None, max_length=20, description="WIDTHxHEIGHT in pixels")
    fps: float | None = Field(default=None, gt=0.01, description="frames per second")
    n: int = Field(default=1, ge=1, le=1, description="videos; always 1")

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("true and false stand for no number and no text")
        return value


@dataclass(frozen=True)
class Asked:
    """A request in full: the video is a function of this, the weights and the given picture."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    shape: Shape

    @property
    def sampling(self) -> SamplingConfig:
        """The solver's settings."""
        return SamplingConfig.model_validate(
            {"schedule": {"num_steps": self.steps}, "guidance": {"scale": self.guidance_scale}}
        )


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in a JSON body (RFC 8259): no NaN, no key twice, bounded depth and digits.

    Raises:
        Refusal: it is something else.
    """
    try:
        tree = json.loads(
            body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_once
        )
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else quoted(error, 120)
        raise Refusal("invalid_json", f"the body is no JSON: {reason}") from None
    if not isinstance(tree, dict):
        raise Refusal("invalid_json", 'the body must be a JSON object, such as {"prompt": "..."}')
    return tree


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("a key is given twice")
    return tree


def check(
    tree: dict[str, Any],
    *,
    pipeline: VideoPipeline,
    bounds: Bounds,
    model: str,
    with_picture: bool = False,
) -> Asked:
    """Fields -> a request that the pipeline can draw within the bounds.

    Raises:
        Refusal: naming the field, what it may be, and what was found.
    """
    fields = _fields(tree)
    if fields.model not in (None, model):
        raise Refusal(
            "model_not_found", f"this service has one model, '{model}'; leave `model` out",
            param="model",
        )  # fmt: skip
    for name in ("prompt", "negative_prompt"):
        _check_text(name, getattr(fields, name), bounds.prompt)
    if not fields.prompt.strip():
        raise Refusal("invalid_prompt", "`prompt` is empty: say what to show", param="prompt")
    _within("steps", fields.steps, bounds.steps)
    _within("guidance_scale", fields.guidance_scale, bounds.guidance)
    shape = _shape(fields, pipeline, bounds)
    work = shape.width * shape.height * shape.num_frames * fields.steps
    _within("size", work, bounds.work, what="width x height x frames x steps")
    try:
        latent_frames = pipeline.latent_shape(shape)[1]
    except Misfit as misfit:
        raise _misfit(misfit) from None
    if with_picture and latent_frames < 2:
        raise Refusal(
            "invalid_value",
            "with an `input_reference`, which is the first frame, ask for more frames",
            param="num_frames",
        )
    seed = secrets.randbelow(2**31) if fields.seed is None else fields.seed
    return Asked(
        fields.prompt, fields.negative_prompt, seed, fields.steps, fields.guidance_scale, shape
    )


def multiples(pipeline: VideoPipeline) -> dict[str, int]:
    """What the sides are multiples of, and the frames after the first."""
    stride, patch = pipeline.vae.stride, pipeline.config.model.patch
    return {
        "width": stride[2] * patch[2],
        "height": stride[1] * patch[1],
        "num_frames": stride[0],
    }


def _misfit(found: Misfit) -> Refusal:
    one, other = found.nearest
    fits = f"{one} or {other}" if found.field == "num_frames" else f"{other}x{one}"
    return Refusal(
        "invalid_value", f"{found.reason}: give `{found.field}` as {fits}", param=found.field
    )


def _fields(tree: dict[str, Any]) -> VideoFields:
    try:
        return VideoFields.model_validate(tree)
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
    # An unknown field first: a misspelt `prompt` is also missing.
    first = min(found, key=lambda one: one["type"] != "extra_forbidden")
    name = quoted(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(str(name), VideoFields.model_fields)
        raise Refusal("unknown_field", f"there is no field `{name}`.{hint}", param=name)
    if first["type"] in ("missing", "string_unicode") and name == "prompt":
        raise Refusal("invalid_prompt", "`prompt` must be text: say what to show", param=name)
    message = first["msg"].removeprefix("Value error, ")
    raise Refusal("invalid_value", f"`{name}`: {message}", param=name)


def _check_text(name: str, text: str, limit: int) -> None:
    if len(text) > limit:
        raise Refusal(
            "out_of_bounds", f"`{name}` has {len(text)} characters; at most {limit}", param=name
        )
    for char in text:
        category = unicodedata.category(char)
        control = category == "Cc" and char not in "\n\r\t"
        if control or category in ("Cs", "Cn") or ord(char) in _DIRECTIONS:
            raise Refusal(
                "invalid_prompt",
                f"`{name}` holds U+{ord(char):04X}, which is no text: leave control characters, "
                "surrogates and direction overrides out",
                param=name,
            )


def _shape(fields: VideoFields, pipeline: VideoPipeline, bounds: Bounds) -> Shape:
    trained = pipeline.shape
    width, height = trained.width, trained.height
    if fields.size is not None:
        match = _SIZE.fullmatch(fields.size)
        if match is None:
            raise Refusal(
                "invalid_value",
                f"`size` is WIDTHxHEIGHT, such as {width}x{height}",
                param="size",
            )
        width, height = int(match[1]), int(match[2])
    _within("size", max(width, height), bounds.side, what="the longer side")
    _within("size", width * height, bounds.num_pixels, what="width x height")
    fps = trained.fps if fields.fps is None else fields.fps
    _within("fps", fps, bounds.fps)
    num_frames = trained.num_frames if fields.num_frames is None else fields.num_frames
    if fields.seconds is not None:
        if fields.num_frames is not None:
            raise Refusal(
                "invalid_value", "give `seconds` or `num_frames`, not both", param="seconds"
            )
        _within("seconds", fields.seconds, bounds.num_frames / fps)
        stride = pipeline.vae.stride[0]
        num_frames = 1 + max(0, round(fields.seconds * fps) - 1) // stride * stride
    _within("num_frames", num_frames, bounds.num_frames)
    return Shape(num_frames, height, width, fps)


def _within(name: str, value: float, limit: float, *, what: str | None = None) -> None:
    if value > limit:
        shown = f"{value:.10g}" if value < 1e18 else "beyond 10^18"  # a float holds no 10^400
        raise Refusal(
            "out_of_bounds",
            f"`{name}` asks for too much: {what or 'it'} is {shown}; at most {limit:.10g}",
            param=name,
        )
