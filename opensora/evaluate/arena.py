"""The arena suite: generated videos read back without any learned network, beside their controls.

Five groups are judged by the same code: the trained model, the same architecture with fresh
weights, the trained model's videos against other prompts, the VAE's reconstruction of true scenes,
and the true scenes themselves. Only what lies clearly between the controls means anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from opensora.arena.dataset import prompts as arena_prompts
from opensora.arena.draw import render
from opensora.arena.scenes import SceneConfig, sample
from opensora.arena.score import Scores, aggregate, score
from opensora.config import Config
from opensora.disk import replace_file
from opensora.errors import UsageError
from opensora.infer import samples
from opensora.infer.pipeline import SamplingConfig, VideoPipeline
from opensora.infer.samples import Job
from opensora.media.read import read_clip
from opensora.runtime import generator

Progress = Callable[[str, int, int], None]

TARGETS = {
    "trained": {"colour": 0.95, "direction": 0.95, "count": 0.85, "shape": 0.7},
    "vae": {"colour": 0.95, "direction": 0.95, "count": 0.95, "psnr": 28.0},
}
"""What the quickstart aims at; the report marks each as reached or not."""


class ArenaConfig(Config):
    """The protocol of a run of the suite."""

    scenes: SceneConfig = SceneConfig()
    seed: int = Field(default=1, ge=0, description="of the prompts and of the samples")
    num_prompts: dict[int, int] = Field(
        default={1: 64, 2: 32, 3: 32},
        description="number of objects -> prompts, all from held-out pairs",
    )
    sampling: SamplingConfig = SamplingConfig()
    batch_size: int = Field(default=16, ge=1, description="videos drawn at a time")


def run(
    trained: VideoPipeline,
    untrained: VideoPipeline | None,
    config: ArenaConfig,
    output: str | Path,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw, judge and write `scores.json`; a stopped call is completed by the same call.

    Args:
        untrained: the same architecture with fresh weights, or None to leave that control out.
        output: gets `samples/`, `samples_untrained/` and `scores.json`.

    Returns:
        What `scores.json` holds: group -> metric -> {mean, low, high, n} with 95 % bootstrap
        intervals, `targets`, and `settings`.
    """
    output = Path(output)
    work = _jobs(config)
    tell = progress or (lambda stage, done, total: None)
    groups: dict[str, list[Scores]] = {}
    records = _draw(trained, work, output / "samples", config, lambda *n: tell("trained", *n))
    videos = [read_clip(output / "samples" / r["file"]).frames for r in records]
    judged = [
        score(v, r["prompt"], fps=r["shape"]["fps"]) for v, r in zip(videos, records, strict=True)
    ]
    _write_scores(output / "samples", records, judged)
    names = {1: "trained", 2: "trained_two_objects", 3: "trained_three_objects"}
    for number, name in names.items():
        groups[name] = [
            s for s, j in zip(judged, work, strict=True) if _objects(j, config) == number
        ]
    groups["shuffled"] = _shuffled(videos, records, config)
    if untrained is not None:
        first = work[: config.num_prompts.get(1, 0)]
        folder = output / "samples_untrained"
        records = _draw(untrained, first, folder, config, lambda *n: tell("untrained", *n))
        groups["untrained"] = _judge(folder, records)
    groups["truth"], groups["vae"] = _reconstructions(trained, config, tell)
    scores: dict[str, Any] = {name: aggregate(rows) for name, rows in groups.items() if rows}
    scores["targets"] = TARGETS
    scores["settings"] = {
        "suite": "arena",
        "weights": trained.fingerprint,
        **config.model_dump(mode="json"),
    }
    text = json.dumps(scores, indent=1, ensure_ascii=False) + "\n"
    replace_file(output / "scores.json", text.encode())
    return scores


def _jobs(config: ArenaConfig) -> list[Job]:
    """All prompts, fewest objects first, each with its own seed."""
    prompts: list[str] = []
    for number, count in sorted(config.num_prompts.items()):
        prompts += arena_prompts(config.scenes, config.seed, count, num_objects=number)
    return samples.jobs(prompts, seed=config.seed * 1_000_000)


def _objects(job: Job, config: ArenaConfig) -> int:
    """How many objects the prompt of a job was drawn for."""
    edge = 0
    for number, count in sorted(config.num_prompts.items()):
        edge += count
        if job.index < edge:
            return number
    raise IndexError(job.index)


def _draw(
    pipeline: VideoPipeline,
    work: Sequence[Job],
    folder: Path,
    config: ArenaConfig,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    _check_shape(pipeline, config)
    return samples.draw(
        pipeline,
        work,
        folder,
        sampling=config.sampling,
        batch_size=config.batch_size,
        progress=progress,
    )


def _check_shape(pipeline: VideoPipeline, config: ArenaConfig) -> None:
    mine, theirs = pipeline.shape, config.scenes
    if (mine.num_frames, mine.height, mine.width) != (theirs.frames, theirs.height, theirs.width):
        raise UsageError(
            f"the model draws {mine.num_frames}x{mine.height}x{mine.width}, the suite's scenes are "
            f"{theirs.frames}x{theirs.height}x{theirs.width}: set scenes.frames, .height, .width"
        )


def _judge(folder: Path, records: list[dict[str, Any]]) -> list[Scores]:
    return [
        score(read_clip(folder / r["file"]).frames, r["prompt"], fps=r["shape"]["fps"])
        for r in records
    ]


def _write_scores(folder: Path, records: list[dict[str, Any]], judged: list[Scores]) -> None:
    """Lay each video's scores beside its record, for the report."""
    lines = [
        json.dumps({**record, "scores": scores}, ensure_ascii=False)
        for record, scores in zip(records, judged, strict=True)
    ]
    replace_file(folder / samples.RECORD_NAME, ("\n".join(lines) + "\n").encode())


def _shuffled(
    videos: list[np.ndarray], records: list[dict[str, Any]], config: ArenaConfig
) -> list[Scores]:
    """Videos of one object against prompts of any number of objects, never their own."""
    count = config.num_prompts.get(1, 0)
    order = torch.randperm(len(records), generator=generator(config.seed, "shuffle")).tolist()
    rows = []
    for index in range(count):
        mine = records[index]["prompt"]
        other = next(
            records[order[(index + k) % len(order)]]["prompt"]
            for k in range(len(order))
            if records[order[(index + k) % len(order)]]["prompt"] != mine
        )
        rows.append(score(videos[index], other, fps=records[index]["shape"]["fps"]))
    return rows


@torch.no_grad()
def _reconstructions(
    pipeline: VideoPipeline, config: ArenaConfig, tell: Progress
) -> tuple[list[Scores], list[Scores]]:
    """Scores of true held-out scenes of one object, and of their way through the VAE."""
    only = config.scenes.model_copy(update={"num_objects": {1: 1.0}})
    count = config.num_prompts.get(1, 0)
    truth, through = [], []
    for index in range(count):
        scene = sample(only, config.seed, index, "heldout")
        frames = render(scene)
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        decoded = pipeline.vae.decode(pipeline.vae.encode(pixels.to(pipeline.device)))[0].cpu()
        error = (decoded - pixels[0]).square().mean().item() / 4
        restored = ((decoded + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()
        truth.append(score(frames, scene.caption, fps=scene.fps, truth=scene))
        row = score(restored, scene.caption, fps=scene.fps, truth=scene)
        through.append({**row, "psnr": float(-10 * np.log10(max(error, 1e-10)))})
        tell("vae", index + 1, count)
    return truth, through
