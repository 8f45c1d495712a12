"""Sampling from the command line and during training, on one pipeline."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from opensora import config as configs
from opensora import runtime
from opensora.cli.asked import Asked, jobs_of
from opensora.cli.progress import Stages
from opensora.cli.sample_rules import refuse_unused
from opensora.diffusion.guidance import GuidanceConfig
from opensora.diffusion.schedule import FullSequenceConfig
from opensora.errors import UsageError, did_you_mean
from opensora.infer import samples
from opensora.infer.jobs import jobs
from opensora.infer.long import PyramidWindowConfig, WindowsConfig
from opensora.infer.parallel import SHARING, team_of
from opensora.infer.pipeline import SamplingConfig, Shape, VideoPipeline
from opensora.infer.placing import place as put
from opensora.infer.prompt_lines import Line
from opensora.infer.records import read_records
from opensora.infer.savings import SavingsConfig
from opensora.media.picture import is_picture, read_picture
from opensora.media.read import read_clip
from opensora.media.sheet import contact_sheet
from opensora.media.write import FORMATS, slug, write_image
from opensora.ops.backends import AttentionChoice
from opensora.ops.selection import select
from opensora.runtime import Runtime
from opensora.text import refine

if TYPE_CHECKING:  # training takes a second to import, and sampling none of it
    from opensora.train.config import TrainConfig
    from opensora.train.tasks import Task
    from opensora.train.trainer import Sampler

OUTPUT = Path("outputs/samples")
GRID = "grid.png"
GRID_COLUMNS = 6
BATCH_SIZE = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LONG = {"windows": WindowsConfig, "pyramid": PyramidWindowConfig}


def draw(checkpoint: Path, asked: Asked) -> None:
    """What `opensora sample` does."""
    settings = _checked(asked)
    refuse_unused(asked, settings, runtime.announced("WORLD_SIZE", 1))
    savings = configs.validate(SavingsConfig, asked.savings, where="sample")
    lines = asked.words.read()
    with runtime.taking_part(asked.device) as place:
        lines = asked.words.said(lines, refined(asked, lines, place))
        pipeline = _pipeline(checkpoint, asked, savings, place)
        shape = asked.size.shape(pipeline, any_length=asked.long is not None)
        total = shape.num_frames
        suffix = asked.suffix or (".png" if total == 1 else ".mp4")
        how: dict[str, Any] = {"sampling": settings, "negative_prompt": asked.negative_prompt}
        if asked.long is not None:
            known = {} if asked.overlap is None else {"overlap": asked.overlap}
            how["long"] = configs.validate(LONG[asked.long], known, where="--long")
            shape = replace(shape, num_frames=pipeline.shape.num_frames)
        how |= {"shape": shape, "num_frames": total, "picture_first": asked.frames.drawn}
        latents = pipeline.latent_shape(shape)[1]
        work = jobs_of(
            lines, asked.frames, seed=asked.seed, per_prompt=asked.per_prompt, latents=latents,
            stride=pipeline.vae.stride[0],
        )  # fmt: skip
        folder = asked.output
        if folder is None:
            folder = OUTPUT / samples.own_folder(work, samples.settings_of(pipeline, **how), suffix)
        with Told(visible=place.is_main) as told:
            records = samples.draw(
                pipeline, work, folder, **how,
                batch_size=asked.batch_size or BATCH_SIZE, suffix=suffix, place=place,
                progress=told.progress, callback=told.step,
                tell=partial(print, file=sys.stderr) if place.is_main else None,
            )  # fmt: skip
        if asked.grid:
            place.barrier()
            if place.is_main:
                write_grid(folder, count=len(work))
    if place.is_main:
        told.tell()
        for record in records:
            print(folder / record["file"])
        if asked.grid:
            print(folder / GRID)


def _pipeline(
    checkpoint: Path, asked: Asked, savings: SavingsConfig, place: Runtime
) -> VideoPipeline:
    """The checkpoint on its device, with what it is guided by and the ranks that it shares with."""
    load = partial(VideoPipeline.from_pretrained, averaged=asked.averaged)
    pipeline = load(checkpoint)
    if asked.dtype != "fp32":  # said as quantize says it, so that samples are not taken for others
        pipeline.dtype = DTYPES[asked.dtype]
        pipeline.fingerprint = f"{pipeline.fingerprint} {asked.dtype}".strip()
    put(pipeline, savings, place.device)
    if asked.weaker is not None:
        pipeline.weaker = load(asked.weaker)
        pipeline.weaker.dtype = pipeline.dtype
        put(pipeline.weaker, savings, place.device)
    model = pipeline.config.model
    select(asked.attention, place.device, pipeline.dtype, model.width // model.num_heads)
    pipeline.team = team_of(asked.share, place, pipeline.model)
    return pipeline


class Told:
    """What is told on stderr while samples are drawn, and after."""

    def __init__(self, *, visible: bool) -> None:
        self._stages = Stages(visible=visible)
        self._before: int | None = None
        self._done = self._total = 0

    def __enter__(self) -> Told:
        self._stages.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stages.__exit__(*exc)

    def progress(self, done: int, total: int) -> None:
        """As `samples.draw` calls it."""
        self._before = done if self._before is None else self._before
        self._done, self._total = done, total
        self._stages.update("sampling", done, total)

    def step(self, step: int, *_: object) -> None:
        """As a pipeline calls it after each denoising step."""
        self._stages.update("sampling", self._done, self._total, f"step {step + 1}")

    def tell(self) -> None:
        """Say what was there before."""
        if self._before:
            print(
                f"{self._before} of {self._total} were drawn before and are kept", file=sys.stderr
            )


def write_grid(folder: Path, *, count: int) -> None:
    """The first `count` samples of a folder in one picture, `grid.png`."""
    clips = []
    for record in read_records(folder)[:count]:
        path = folder / record["file"]
        if is_picture(path):
            clips.append(read_picture(path)[None])
            continue
        total = record.get("num_frames") or record["shape"]["num_frames"]
        shown = min(GRID_COLUMNS, total)
        fps = record["shape"]["fps"] * shown / total  # so that a long video is not held whole
        clips.append(read_clip(path, num_frames=shown, fps=fps).frames)
    if all(len(clip) == 1 for clip in clips):
        clips = np.concatenate(clips)
    columns = math.ceil(len(clips) ** 0.5) if isinstance(clips, np.ndarray) else GRID_COLUMNS
    write_image(folder / GRID, contact_sheet(clips, columns=columns))


def refined(asked: Asked, lines: list[tuple[str, Line]], place: Runtime) -> dict[str, str]:
    """Prompt -> its longer form, asked for once by the first rank and kept beside the samples."""
    if not asked.refine:
        return {}
    known: dict[str, str] = {}
    if place.is_main:
        local = Path(asked.refine).is_dir()
        ask = refine.local(asked.refine) if local else None
        ask = ask or refine.endpoint(asked.refine, asked.refine_model)
        prompts = [prompt for _, line in lines for prompt in line.prompts]
        by = str(Path(asked.refine).resolve()) if local else asked.refine_model
        known = refine.remembered(ask, _answers(asked), prompts, by=by)
    return place.gather_objects(known)[0]


def _answers(asked: Asked) -> Path:
    """Where a language model's answers are kept: beside the samples, or one file for each model."""
    if asked.output is not None:
        return asked.output / "refined.json"
    return OUTPUT / f"refined-{slug(f'{asked.refine} {asked.refine_model}')}.json"


def _checked(asked: Asked) -> SamplingConfig:
    """The settings of sampling; what can be refused before a checkpoint is read is refused here."""
    for name, value, choices in (
        ("format", asked.suffix and asked.suffix[1:], (None, *(f[1:] for f in FORMATS))),
        ("attention", asked.attention, get_args(AttentionChoice)),
        ("long", asked.long, (None, *LONG)),
        ("share", asked.share, SHARING),
        ("dtype", asked.dtype, DTYPES),
    ):
        if value not in choices:
            known = [choice for choice in choices if choice]
            raise UsageError(f"--{name} {value} is unknown.{did_you_mean(str(value), known)}")
    tree = configs.override(asked.sampling, asked.settings)
    return configs.validate(SamplingConfig, tree, where="sample")


def sampler_for(config: TrainConfig) -> Sampler:
    """The function that draws sample videos with a text-to-video task in training."""
    wanted = config.samples
    settings = SamplingConfig(
        schedule=FullSequenceConfig(num_steps=wanted.steps),
        guidance=GuidanceConfig(scale=wanted.guidance_scale),
    )

    def sample(
        task: Task, step: int, output: Path, shape: dict[str, Any], *, place: Runtime
    ) -> None:
        folder = output / "samples" / f"step-{step:06d}"
        work = jobs(wanted.prompts, seed=config.seed)
        pipeline = pipeline_of(task, step, shape)
        samples.draw(pipeline, work, folder, sampling=settings, place=place)

    return sample


def pipeline_of(task: Task, step: int, shape: dict[str, Any]) -> VideoPipeline:
    """The pipeline of a task in training, on the task's own weights."""
    from opensora.train.text_to_video import TextToVideo

    assert isinstance(task, TextToVideo), "TrainConfig allows this for no other task"
    return VideoPipeline(
        model=task.model,
        text=task.text_encoder,
        vae=task.vae,
        config=task.config,
        shape=Shape(**shape),
        fingerprint=f"step {step}",
    ).to(next(task.parameters()).device)
