"""What a user asks of `opensora sample`, as jobs: prompts, given frames, sizes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opensora.data.buckets import frame_sizes, num_pixels
from opensora.errors import UsageError
from opensora.infer.conditions import Reference, check_reference
from opensora.infer.jobs import PROMPT_FILES, Job, read_prompts
from opensora.infer.pipeline import Shape, VideoPipeline
from opensora.infer.prompt_lines import Line, parse, with_scores
from opensora.infer.settings import Misfit, check_fit
from opensora.media.picture import is_picture

STRENGTH = 0.6  # of an edit


def _typed(text: str) -> str:
    """A prompt as it was typed: Python leaves what the locale does not know in surrogates."""
    try:
        text.encode()
        return text
    except UnicodeError:
        pass
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise UsageError(f"the prompt {text!a} is no UTF-8 text") from None


@dataclass(frozen=True)
class Words:
    """Prompts as arguments or in a file, and scores that are said with them."""

    prompts: Sequence[str]
    file: Path | None = None
    reference: str = ""
    mask_strategy: str = ""
    aesthetic: float | None = None
    motion: float | None = None
    camera: str | None = None

    def read(self) -> list[tuple[str, Line]]:
        """Each prompt as it was written, and what it means.

        Raises:
            UsageError: a file that cannot be read, or a line that makes no sense.
        """
        for text in self.prompts:
            if Path(text).suffix.lower() in PROMPT_FILES and Path(text).is_file():
                raise UsageError(f"{text} is a file; for the prompts in it: --file {text}")
        typed = [_typed(text) for text in self.prompts]
        texts = read_prompts(self.file) if self.file is not None else typed
        options = {"reference_path": self.reference, "mask_strategy": self.mask_strategy}
        return [(text, parse(text, **options)) for text in texts]

    def said(
        self, lines: Sequence[tuple[str, Line]], refined: dict[str, str]
    ) -> list[tuple[str, Line]]:
        """The lines with what the model is told in place of each prompt.

        Args:
            refined: prompt -> its longer form, where it has one.
        """

        def told(prompt: str) -> str:
            return with_scores(
                refined.get(prompt, prompt),
                aesthetic=self.aesthetic,
                motion=self.motion,
                camera=self.camera,
            )

        return [
            (text, replace(line, prompts=tuple(map(told, line.prompts)))) for text, line in lines
        ]


@dataclass(frozen=True)
class Frames:
    """Frames that are given to every video.

    Attributes:
        first, last: pictures or videos that it begins and ends with.
        num_given: pixel frames that are given of a video; a quarter of the clip where it is None.
        keyframes: pictures that it passes, evenly spaced.
        edit: a video that is changed from the noise level `strength` on; STRENGTH by default.
        loop: it ends with the picture that it begins with.
        drawn: the picture that it begins with is drawn first.
    """

    first: Path | None = None
    last: Path | None = None
    num_given: int | None = None
    keyframes: Sequence[Path] = ()
    edit: Path | None = None
    strength: float | None = None
    loop: bool = False
    drawn: bool = False

    @property
    def has_video(self) -> bool:
        """Whether `num_given` counts the frames of something."""
        return any(path and not is_picture(path) for path in (self.first, self.last))

    def references(self, latents: int, stride: int) -> tuple[Reference, ...]:
        """Where the files go in a video of so many latent frames.

        Raises:
            UsageError: options that contradict each other.
            DataError: a file that is not there.
        """
        self._check()
        for path in filter(None, (self.first, self.last, self.edit, *self.keyframes)):
            check_reference(path)
        found = []
        if self.edit is not None:
            level = STRENGTH if self.strength is None else self.strength
            found.append(Reference(str(self.edit), level=level))
        if self.first is not None:
            found.append(_head(self.first, self._count(latents, stride)))
        if self.last is not None:
            found.append(_tail(self.last, self._count(latents, stride)))
        if self.loop and self.first is not None:
            found.append(Reference(str(self.first), at=-1, count=1))
        if self.keyframes:
            found += _spaced(self.keyframes, latents)
        return tuple(found)

    def _count(self, latents: int, stride: int) -> int:
        if self.num_given is None:
            return max(1, latents // 4)
        count = 1 + (self.num_given - 1) // stride
        if count >= latents:
            raise UsageError(
                f"--given {self.num_given} leaves nothing to draw of {1 + stride * (latents - 1)} "
                "frames; give fewer, or ask for more --frames"
            )
        return count

    def _check(self) -> None:
        if self.loop and self.first is None:
            raise UsageError("--loop needs the picture to begin and end with: --first")
        if self.loop and self.last is not None:
            raise UsageError("--loop ends with the first picture: leave out --last")
        if self.drawn and (self.first or self.last or self.edit or self.keyframes):
            raise UsageError("--picture-first draws the first picture: give no frames beside it")
        if len(self.keyframes) == 1:
            raise UsageError("give two or more --keyframe, or one picture as --first or --last")


def _head(path: Path, count: int) -> Reference:
    """Its last frames, so that the video goes on from there."""
    if is_picture(path):
        return Reference(str(path), count=1)
    return Reference(str(path), start=-count, count=count)


def _tail(path: Path, count: int) -> Reference:
    """Its first frames, so that the video leads to there."""
    if is_picture(path):
        return Reference(str(path), at=-1, count=1)
    return Reference(str(path), at=-count, count=count)


def _spaced(paths: Sequence[Path], latents: int) -> list[Reference]:
    if len(paths) >= latents:
        raise UsageError(
            f"{len(paths)} keyframes leave nothing to draw of {latents} latent frames; give fewer, "
            "or ask for more --frames"
        )
    places = [round(k * (latents - 1) / (len(paths) - 1)) for k in range(len(paths))]
    return [Reference(str(p), at=at, count=1) for p, at in zip(paths, places, strict=True)]


@dataclass(frozen=True)
class Size:
    """Frames, size and rate; what is None is as trained.

    Attributes:
        resolution: an area by name, such as 240p (16:9) or 256px (a square).
        aspect: width:height; Open-Sora 1.x wrote height:width.
    """

    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    resolution: str | None = None
    aspect: str | None = None

    def shape(self, pipeline: VideoPipeline, *, any_length: bool = False) -> Shape:
        """The shape of the videos.

        Args:
            any_length: frames are those of a long video.

        Raises:
            UsageError: sizes that contradict each other, have no such form, or do not fit the
                model.
        """
        known = {"num_frames": self.num_frames, "fps": self.fps}
        known |= {"height": self.height, "width": self.width}
        shape = replace(pipeline.shape, **{k: v for k, v in known.items() if v is not None})
        stride, patch = pipeline.vae.stride, pipeline.config.model.patch
        if self.resolution is not None or self.aspect is not None:
            if self.height is not None or self.width is not None:
                raise UsageError(
                    "give --height and --width, or --resolution and --aspect, not both"
                )
            sides = (stride[1] * patch[1], stride[2] * patch[2])
            height, width = self._named(pipeline.shape, sides)
            shape = replace(shape, height=height, width=width)
        frames = 1 if any_length else shape.num_frames
        try:
            check_fit(frames, shape.height, shape.width, stride=stride, patch=patch)
        except Misfit as found:
            one, other = found.nearest
            frames = f"--frames {one} or {other}, or any number with --long"
            fits = frames if found.field == "num_frames" else f"--height {one} --width {other}"
            raise UsageError(f"{found.reason}: give {fits}") from None
        return shape

    def _named(self, trained: Shape, multiple: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a resolution and an aspect ratio."""
        try:
            area = trained.height * trained.width * 1.0
            area = num_pixels(self.resolution) if self.resolution else area
            aspect = self.aspect or f"{trained.width}:{trained.height}"
            wide, high = (float(part) for part in aspect.split(":"))
            if not (0 < wide < 1e6 and 0 < high < 1e6):
                raise ValueError(f"the aspect ratio {aspect} is not positive")
        except ValueError:
            raise UsageError(
                f"--resolution {self.resolution or 'as trained'}, --aspect "
                f"{self.aspect or 'as trained'}: write 240p or 256px, and 16:9 (width:height); "
                "pixels are given as --height and --width"
            ) from None
        ((height, width),) = frame_sizes(area, (aspect,), multiple)
        return height, width


@dataclass(frozen=True)
class Asked:
    """What a call of `opensora sample` asks for, beside the checkpoint.

    Attributes:
        words: prompts, and what is added to them.
        frames: that are given.
        size: of the videos.
        sampling: tree of `SamplingConfig`; `settings` are KEY=VALUE of the same.
        long: kind of long video, or None; `overlap` of its windows in latent frames.
        output: the folder; None is one of its own in `OUTPUT`.
        suffix: the format; None is that of a picture for one frame, of a video for more.
        weaker: checkpoint to guide away from.
        share: what ranks share.
        grid: write `grid.png`, a row of frames for each video, or all pictures.
        refine: endpoint or folder of a language model that writes prompts out.
        savings: tree of `SavingsConfig`.
        dtype: fp32, bf16 or fp16, the arithmetic of the denoiser.
    """

    words: Words
    frames: Frames
    size: Size
    output: Path | None
    seed: int
    per_prompt: int
    sampling: dict[str, Any]
    negative_prompt: str
    batch_size: int | None
    suffix: str | None
    averaged: bool
    device: str
    attention: str
    settings: list[str] = field(default_factory=list)
    long: str | None = None
    overlap: int | None = None
    weaker: Path | None = None
    share: str = "prompts"
    refine: str = ""
    refine_model: str = ""
    grid: bool = False
    savings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "fp32"


def jobs_of(
    lines: Sequence[tuple[str, Line]],
    frames: Frames,
    *,
    seed: int,
    per_prompt: int,
    latents: int,
    stride: int,
) -> list[Job]:
    """One job for each line and repetition; frames of a line cover those given to all.

    Args:
        latents: latent frames of a video, or of a window of a long one.
    """
    shared = frames.references(latents, stride)
    jobs = []
    for text, line in lines:
        told = () if line.prompts == (text,) else line.prompts
        for _ in range(per_prompt):
            index = len(jobs)
            jobs.append(Job(index, text, seed + index, told, (*shared, *line.references)))
    return jobs
