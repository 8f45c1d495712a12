"""Sampling from the command line and during training, on one pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from opensora import config as configs
from opensora import runtime
from opensora.cli.progress import Stages
from opensora.diffusion.guidance import GuidanceConfig
from opensora.diffusion.schedule import FullSequenceConfig
from opensora.errors import UsageError, did_you_mean
from opensora.infer import samples
from opensora.infer.pipeline import SamplingConfig, Shape, VideoPipeline
from opensora.media.write import FORMATS
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
) -> None:
    """What `opensora sample` does."""
    if suffix not in FORMATS:
        formats = [f.lstrip(".") for f in FORMATS]
        raise UsageError(f"--format {suffix[1:]} is unknown.{did_you_mean(suffix[1:], formats)}")
    settings = configs.validate(SamplingConfig, sampling, where="sample")
    texts = samples.read_prompts(file) if file is not None else prompts
    place = runtime.start(device)
    pipeline = VideoPipeline.from_pretrained(checkpoint, averaged=averaged).to(place.device)
    with Stages() as stages:
        records = samples.draw(
            pipeline,
            samples.jobs(texts, seed=seed, per_prompt=per_prompt),
            output,
            sampling=settings,
            shape=replace(pipeline.shape, **shape),
            negative_prompt=negative_prompt,
            batch_size=batch_size,
            suffix=suffix,
            progress=lambda done, total: stages.update("sampling", done, total),
        )
    for record in records:
        print(output / record["file"])


def sampler_for(config: TrainConfig) -> Sampler:
    """The function that draws sample videos with a task in training."""
    wanted = config.samples
    settings = SamplingConfig(
        schedule=FullSequenceConfig(num_steps=wanted.steps),
        guidance=GuidanceConfig(scale=wanted.guidance_scale),
    )

    def sample(task: Task, step: int, output: Path, shape: dict[str, Any]) -> None:
        if not isinstance(task, TextToVideo):
            raise UsageError("samples.every needs the task text_to_video")
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
