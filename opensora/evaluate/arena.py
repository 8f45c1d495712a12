"""The arena suite: generated videos read back without any learned network, beside their controls.

Five groups are judged by the same code: the trained model, the same architecture with fresh
weights, the trained model's videos against other prompts, the VAE's reconstruction of true scenes,
and the true scenes themselves. Only what lies clearly between the controls means anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from opensora.arena.dataset import prompts as arena_prompts
from opensora.arena.draw import render
from opensora.arena.scenes import SceneConfig, sample
from opensora.arena.score import Scores, aggregate, score
from opensora.arena.truth import Scene
from opensora.config import Config
from opensora.disk import replace_file
from opensora.errors import UsageError
from opensora.evaluate import drawing
from opensora.evaluate.fidelity import reconstruct
from opensora.evaluate.similarity import psnr, unit
from opensora.evaluate.suite import (
    Progress,
    Results,
    Row,
    Subject,
    Suite,
    check_finite,
    shared,
    write_scores,
)
from opensora.infer.jobs import Job, jobs
from opensora.infer.pipeline import SamplingConfig, VideoPipeline
from opensora.infer.records import RECORD_NAME
from opensora.media.read import read_clip
from opensora.runtime import ALONE, Runtime, generator

TARGETS = {
    "trained": {"colour": 0.95, "direction": 0.95, "count": 0.85, "shape": 0.7},
    "vae": {"colour": 0.95, "direction": 0.95, "count": 0.95, "psnr": 28.0},
    "untrained": {name: {"max": 0.1} for name in ("colour", "direction", "count", "shape")},
}
"""What the quickstart aims at; the report marks each as reached or not."""


TRAINED_GROUPS = {1: "trained", 2: "trained_two_objects", 3: "trained_three_objects"}
"""Number of objects in a prompt -> the group of the videos drawn for such prompts."""


class ArenaConfig(Config):
    """The protocol of a run of the suite."""

    scenes: SceneConfig = SceneConfig()
    seed: int = Field(default=1, ge=0, lt=2**32, description="of the prompts and of the samples")
    num_prompts: dict[Annotated[int, Field(ge=1, le=3)], Annotated[int, Field(ge=0)]] = Field(
        default={1: 64, 2: 32, 3: 32},
        description="number of objects -> prompts, all from held-out pairs",
    )
    sampling: SamplingConfig = SamplingConfig()
    batch_size: int = Field(default=8, ge=1, description="videos drawn at a time")


def run(
    trained: VideoPipeline,
    untrained: VideoPipeline | None,
    config: ArenaConfig,
    output: str | Path,
    *,
    place: Runtime = ALONE,
    progress: Progress | None = None,
) -> Results:
    """Draw, judge and write `scores.json`; a stopped call is completed by the same call.

    Args:
        untrained: the same architecture with fresh weights, or None to leave that control out.
        output: gets `samples/`, `samples_untrained/` and `scores.json`.
        place: its ranks share the drawing and the judging; the first one writes the scores.

    Returns:
        What `scores.json` holds, on every rank: group -> metric -> {mean, low, high, n} with 95 %
        bootstrap intervals, `targets`, and `settings`.

    Raises:
        DataError: a video does not decode to what was drawn, twice.
        UsageError: the model draws another shape, or the folder holds other samples.
        NumericsError: a score, or a value of the VAE, is no finite number; no `scores.json` then.
    """
    output = Path(output)
    _check_shape(trained, config)
    tell = progress or (lambda stage, done, total: None)
    judge = partial(_drawn_and_judged, config=config, place=place, tell=tell)
    work = _jobs(config)
    others = _others([job.prompt for job in work], config)
    judged, shuffled = judge("trained", trained, work, output / "samples", others)
    groups: dict[str, list[Scores]] = {
        name: [s for s, job in zip(judged, work, strict=True) if _objects(job, config) == number]
        for number, name in TRAINED_GROUPS.items()
    }
    groups["shuffled"] = shuffled
    if untrained is not None:
        first = work[: config.num_prompts.get(1, 0)]
        folder = output / "samples_untrained"
        groups["untrained"], _ = judge("untrained", untrained, first, folder, {})
    groups["truth"], groups["vae"] = _reconstructions(trained, config, place, tell)
    check_finite([Row(g, f"number {i}", s) for g, of in groups.items() for i, s in enumerate(of)])
    scores: dict[str, Any] = {name: aggregate(rows) for name, rows in groups.items() if rows}
    scores["targets"] = TARGETS
    scores["settings"] = {
        "suite": "arena",
        "weights": trained.fingerprint,
        **config.model_dump(mode="json"),
    }
    if place.is_main:
        write_scores(output, scores)
    return scores


def _jobs(config: ArenaConfig) -> list[Job]:
    """All prompts, fewest objects first, each with its own seed."""
    prompts: list[str] = []
    for number, count in sorted(config.num_prompts.items()):
        prompts += arena_prompts(config.scenes, config.seed, count, num_objects=number)
    return jobs(prompts, seed=config.seed * 1_000_000)


def _objects(job: Job, config: ArenaConfig) -> int:
    """How many objects the prompt of a job was drawn for."""
    edge = 0
    for number, count in sorted(config.num_prompts.items()):
        edge += count
        if job.index < edge:
            return number
    raise IndexError(job.index)


def _check_shape(pipeline: VideoPipeline, config: ArenaConfig) -> None:
    mine, theirs = pipeline.shape, config.scenes
    if (mine.num_frames, mine.height, mine.width) != (theirs.frames, theirs.height, theirs.width):
        raise UsageError(
            f"the model draws {mine.num_frames}x{mine.height}x{mine.width}, the suite's scenes are "
            f"{theirs.frames}x{theirs.height}x{theirs.width}: set scenes.frames, .height, .width"
        )


def _score(
    video: np.ndarray, prompt: str, fps: float, config: ArenaConfig, truth: Scene | None = None
) -> Scores:
    """One video against one prompt, with the words of speed and size as the scenes mean them."""
    scenes = config.scenes
    return score(video, prompt, fps=fps, truth=truth, speed=scenes.speed, radius=scenes.radius)


def _drawn_and_judged(
    stage: str,
    pipeline: VideoPipeline,
    work: Sequence[Job],
    folder: Path,
    others: Mapping[int, list[str]],
    *,
    config: ArenaConfig,
    place: Runtime,
    tell: Progress,
) -> tuple[list[Scores], list[Scores]]:
    """Scores of the videos of some jobs, and of videos against `others`, prompts of other jobs."""
    records = drawing.draw(
        pipeline,
        work,
        folder,
        sampling=config.sampling,
        batch_size=config.batch_size,
        place=place,
        progress=partial(tell, stage),
    )

    def judge(index: int) -> list[Scores]:
        frames = read_clip(folder / records[index]["file"]).frames
        prompts = [work[index].prompt, *others.get(index, ())]
        fps = records[index]["shape"]["fps"]
        return [_score(frames, prompt, fps, config) for prompt in prompts]

    found = shared(place, len(work), judge, partial(tell, f"judging {stage}"))
    own = [scores[0] for scores in found]
    check_finite([Row(stage, j.prompt, s) for j, s in zip(work, own, strict=True)])
    if place.is_main:
        _write_scores(folder, records, own)
    return own, [scores for rest in found for scores in rest[1:]]


def _write_scores(folder: Path, records: list[dict[str, Any]], judged: list[Scores]) -> None:
    """Lay each video's scores beside its record, for the report."""
    lines = [
        json.dumps({**record, "scores": scores}, ensure_ascii=False)
        for record, scores in zip(records, judged, strict=True)
    ]
    replace_file(folder / RECORD_NAME, ("\n".join(lines) + "\n").encode())


def _others(prompts: list[str], config: ArenaConfig) -> dict[int, list[str]]:
    """Video of one object -> a prompt of any number of objects that is not its own, if there is."""
    order = torch.randperm(len(prompts), generator=generator(config.seed, "shuffle")).tolist()
    found = {}
    for index in range(config.num_prompts.get(1, 0)):
        turned = [prompts[k] for k in (*order[index:], *order[:index])]
        found[index] = [p for p in turned if p != prompts[index]][:1]
    return found


def _reconstructions(
    pipeline: VideoPipeline, config: ArenaConfig, place: Runtime, tell: Progress
) -> tuple[list[Scores], list[Scores]]:
    """Scores of true held-out scenes of one object, and of their way through the VAE."""
    only = config.scenes.model_copy(update={"num_objects": {1: 1.0}})

    def judge(index: int) -> tuple[Scores, Scores]:
        scene = sample(only, config.seed, index, "heldout")
        frames = render(scene)
        restored = reconstruct(pipeline.vae, frames)
        first, second = (unit(torch.from_numpy(x)) for x in (restored, frames))
        truth = _score(frames, scene.caption, scene.fps, config, truth=scene)
        row = _score(restored, scene.caption, scene.fps, config, truth=scene)
        return truth, {**row, "psnr": float(psnr(first, second).mean())}

    found = shared(place, config.num_prompts.get(1, 0), judge, partial(tell, "vae"))
    return [truth for truth, _ in found], [through for _, through in found]


def _run(subject: Subject, config: ArenaConfig, output: Path, progress: Progress) -> Results:
    trained = subject.model
    untrained = subject.fresh() if subject.fresh is not None else None
    return run(trained, untrained, config, output, place=subject.place, progress=progress)


SUITE = Suite(
    ArenaConfig, _run, ("colour", "direction", "count", "shape", "binding", "success", "psnr")
)
