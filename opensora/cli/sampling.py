"""Sampling from the command line and during training, on one pipeline."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from opensora import config as configs
from opensora import runtime
from opensora.cli.progress import Stages
from opensora.diffusion.guidance import GuidanceConfig
from opensora.diffusion.schedule import FullSequenceConfig
from opensora.errors import UsageError, did_you_mean
from opensora.infer import samples
from opensora.infer.pipeline import SamplingConfig, Shape, VideoPipeline
from opensora.media.write import FORMATS
from opensora.ops.backends import AttentionChoice
from opensora.ops.selection import select
from opensora.train.config import TrainConfig
from opensora.train.tasks import Task
from opensora.train.text_to_video import TextToVideo
from opensora.train.trainer import Sampler


def draw(
    checkpoint: Path,
    prompts: list[str],
    *,
    file: Path | None,
    output: Path,
    seed: int,
    per_prompt: int,
    sampling: dict[str, Any],
    shape: dict[str, Any],
    negative_prompt: str,
    batch_size: int,
    suffix: str,
    averaged: bool,
    device: str,
    attention: str,
) -> None:
    """What `opensora sample` does."""
    if suffix not in FORMATS:
        formats = [f.lstrip(".") for f in FORMATS]
        raise UsageError(f"--format {suffix[1:]} is unknown.{did_you_mean(suffix[1:], formats)}")
    if attention not in (choices := get_args(AttentionChoice)):
        raise UsageError(f"--attention {attention} is unknown.{did_you_mean(attention, choices)}")
    settings = configs.validate(SamplingConfig, sampling, where="sample")
    texts = samples.read_prompts(file) if file is not None else prompts
    place = runtime.start(device)
    try:
        pipeline = VideoPipeline.from_pretrained(checkpoint, averaged=averaged).to(place.device)
        model = pipeline.config.model
        select(attention, place.device, pipeline.dtype, model.width // model.num_heads)
        work = samples.jobs(texts, seed=seed, per_prompt=per_prompt)
        with Stages(visible=place.is_main) as stages:
            records = samples.draw(
                pipeline,
                work[place.rank :: place.world_size],
                output,
                sampling=settings,
                shape=replace(pipeline.shape, **shape),
                negative_prompt=negative_prompt,
                batch_size=batch_size,
                suffix=suffix,
                progress=partial(stages.update, "sampling"),
            )
    finally:
        place.close()
    for record in records:
        print(output / record["file"])


def sampler_for(config: TrainConfig) -> Sampler:
    """The function that draws sample videos with a text-to-video task in training."""
    wanted = config.samples
    settings = SamplingConfig(
        schedule=FullSequenceConfig(num_steps=wanted.steps),
        guidance=GuidanceConfig(scale=wanted.guidance_scale),
    )

    def sample(task: Task, step: int, output: Path, shape: dict[str, Any]) -> None:
        assert isinstance(task, TextToVideo), "TrainConfig allows samples for no other task"
        device = next(task.parameters()).device
        pipeline = VideoPipeline(
            model=task.model,
            text=task.text_encoder,
            vae=task.vae,
            config=task.config,
            shape=Shape(**shape),
            fingerprint=f"step {step}",
        ).to(device)
        folder = output / "samples" / f"step-{step:06d}"
        work = samples.jobs(wanted.prompts, seed=config.seed)
        samples.draw(pipeline, work, folder, sampling=settings)

    return sample
