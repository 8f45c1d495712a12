"""The suite `physics`: a model sees how a scene begins; its future is held against the true one.

Scenes are the arena's, so their future is simulated exactly. What two takes of one scene share
bounds what can be asked: the second take begins alike and its clock runs a few percent faster or
slower. All of them are compared as files hold them. A folder of generated videos is judged against
a folder of real ones by file name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from opensora.arena.draw import render
from opensora.arena.scenes import SceneConfig, sample
from opensora.arena.truth import Scene
from opensora.config import Config
from opensora.data.folder import SUFFIXES
from opensora.errors import DataError, UsageError
from opensora.evaluate import drawing, physics_iq
from opensora.evaluate.suite import Progress, Results, Row, Subject, Suite, shared, write
from opensora.infer.conditions import Reference
from opensora.infer.jobs import Job
from opensora.infer.pipeline import SamplingConfig, VideoPipeline
from opensora.media.read import read_clip
from opensora.media.write import write_video
from opensora.runtime import Runtime, uniform

_RESAMPLES = 2000


class PhysicsConfig(Config):
    """Which scenes, how much of them is given, and how the rest is drawn."""

    scenes: SceneConfig = SceneConfig()
    num: int = Field(default=64, ge=1, description="scenes, all of held-out pairs")
    given: int = Field(default=1, ge=1, description="first frames of a scene that the model sees")
    take_variation: float = Field(
        default=0.05, gt=0, lt=0.5, description="how far the clock of the second take is off"
    )
    seed: int = Field(default=1, ge=0, lt=2**32, description="of the scenes and of the samples")
    sampling: SamplingConfig = SamplingConfig()
    batch_size: int = Field(default=8, ge=1, description="videos drawn at a time")
    real: Path | None = Field(
        default=None, description="folder of real videos, to judge a folder of generated ones"
    )
    take_two: Path | None = Field(
        default=None, description="folder of second takes of the real ones; without it no score"
    )

    @model_validator(mode="after")
    def _takes(self) -> PhysicsConfig:
        if self.take_two is not None and self.real is None:
            raise ValueError("take_two goes with real, the folder of the first takes")
        return self


def run(subject: Subject, config: PhysicsConfig, output: Path, progress: Progress) -> Results:
    """Judge a model's futures, or a folder of videos.

    Returns:
        Groups `generated`, `untrained` (the same with fresh weights), `still` (the last given
        frame repeated), `shuffled` (another scene's true future) and `truth` (the second take):
        spatial_iou, spatiotemporal_iou, weighted_spatial_iou, mse, and `score`, Physics-IQ's from
        0 to 100, with bootstrap intervals over scenes. Only frames after the given ones count.

    Raises:
        UsageError: a checkpoint with `real`, a folder without it, or a model of another shape.
        DataError: videos are missing or differ in shape.
    """
    if subject.videos is not None:
        return _judge_folder(subject, config, output, progress)
    pipeline, place = subject.model, subject.place
    if config.real is not None:
        raise UsageError("real is for judging a folder of videos: leave it out with a checkpoint")
    scenes = [sample(config.scenes, config.seed, i, "heldout") for i in range(config.num)]
    cut = _check_shape(pipeline, config)
    work = _jobs(pipeline, scenes, config, output / "given", place)
    drawn = {"generated": _draw(pipeline, work, config, output / "samples", place, progress)}
    if subject.fresh is not None:
        fresh, folder = subject.fresh(), output / "samples_untrained"
        drawn["untrained"] = _draw(fresh, work, config, folder, place, progress)

    def judge(index: int) -> dict[str, dict[str, float]]:
        scene = render(scenes[index])
        rendered = {"still": np.repeat(scene[cut - 1 : cut], len(scene), axis=0)}
        if len(scenes) > 1:
            rendered["shuffled"] = render(scenes[(index + 1) % len(scenes)])
        rendered["truth"] = render(another_take(scenes[index], config))
        filed = partial(drawing.through_a_file, fps=scenes[index].fps)
        futures = {group: read_clip(files[index]).frames for group, files in drawn.items()}
        futures |= {group: filed(video) for group, video in rendered.items()}
        truth = filed(scene)
        return {g: physics_iq.measure(truth[cut:], video[cut:]) for g, video in futures.items()}

    found = shared(place, len(scenes), judge, partial(progress, "judging"))
    if not place.is_main:
        return {}
    rows = [
        Row(group, f"{index} {scene.caption}", found[index][group])
        for group in found[0]
        for index, scene in enumerate(scenes)
    ]
    settings = {
        "suite": "physics",
        "weights": pipeline.fingerprint,
        "codec": "mp4",
        "given_frames": cut,
        **config.model_dump(mode="json", exclude={"batch_size", "real", "take_two"}),
    }
    return write(output, rows, settings=settings, estimates=_scores(rows, "truth"))


def another_take(scene: Scene, config: PhysicsConfig) -> Scene:
    """The same scene from the same first frame, on a clock that runs up to `take_variation` off.

    Times of frames are scaled by a factor addressed by the scene and held at the end of the scene.
    """
    turn = float(uniform([scene.index], config.seed, "another take"))
    off = config.take_variation * (0.5 + abs(2 * turn - 1) / 2)
    times = np.arange(scene.frames) * (1 + (off if turn > 0.5 else -off))
    times = times.clip(max=scene.frames - 1)
    begin = np.floor(times).astype(int).clip(max=max(0, scene.frames - 2))
    end = (begin + 1).clip(max=scene.frames - 1)

    def at(track: np.ndarray) -> np.ndarray:
        part = (times - begin).reshape(-1, *[1] * (track.ndim - 1))
        return track[begin] * (1 - part) + track[end] * part

    tracks = ("positions", "velocities", "radii", "visible", "pan", "zoom")
    return replace(scene, **{name: at(getattr(scene, name)) for name in tracks})


def _check_shape(pipeline: VideoPipeline, config: PhysicsConfig) -> int:
    """How many frames are given and do not count: those of whole latent frames.

    Raises:
        UsageError: the model draws another shape, or nothing is left to make.
    """
    mine, theirs = pipeline.shape, config.scenes
    if (mine.num_frames, mine.height, mine.width) != (theirs.frames, theirs.height, theirs.width):
        raise UsageError(
            f"the model draws {mine.num_frames}x{mine.height}x{mine.width}, the suite's scenes are "
            f"{theirs.frames}x{theirs.height}x{theirs.width}: set scenes.frames, .height, .width"
        )
    stride = pipeline.vae.stride[0]
    if (config.given - 1) % stride or config.given >= mine.num_frames:
        raise UsageError(
            f"given={config.given} frames of {mine.num_frames} do not fit the VAE: give "
            f"1 + k*{stride}, and leave some to be made"
        )
    return config.given


def _jobs(
    pipeline: VideoPipeline,
    scenes: Sequence[Scene],
    config: PhysicsConfig,
    folder: Path,
    place: Runtime,
) -> list[Job]:
    """Videos that begin as the scenes do, under their captions; `folder` gets the beginnings."""
    latents = 1 + (config.given - 1) // pipeline.vae.stride[0]
    # A picture is exact; several frames go through the best quality that a video has.
    suffix, crf = (".png", None) if config.given == 1 else (".mp4", 0)

    def job(index: int) -> Job:
        path, scene = folder / f"{index:06d}{suffix}", scenes[index]
        if not path.is_file():
            write_video(path, render(scene)[: config.given], fps=scene.fps, crf=crf)
        reference = Reference(str(path), count=latents)
        seed = config.seed * 1_000_000 + index
        return Job(index, scene.caption, seed, references=(reference,))

    return shared(place, len(scenes), job, lambda *_: None)


def _draw(
    pipeline: VideoPipeline,
    work: Sequence[Job],
    config: PhysicsConfig,
    folder: Path,
    place: Runtime,
    progress: Progress,
) -> list[Path]:
    """The files of the jobs; a stopped call goes on."""
    records = drawing.draw(
        pipeline,
        work,
        folder,
        sampling=config.sampling,
        batch_size=config.batch_size,
        place=place,
        progress=partial(progress, f"drawing {folder.name}"),
    )
    return [folder / record["file"] for record in records]


def _judge_folder(
    subject: Subject, config: PhysicsConfig, output: Path, progress: Progress
) -> Results:
    """Generated videos against real ones of the same name."""
    videos, place = subject.videos, subject.place
    assert videos is not None, "the caller has looked"
    if config.real is None:
        raise UsageError("judging a folder of videos needs real=FOLDER, whose names are the same")
    names = _names(videos)
    wanted = _names(config.real)
    missing = sorted({*wanted} - {*names})
    if missing or not wanted:
        raise DataError(
            f"{videos} lacks {len(missing)} of the {len(wanted)} videos of {config.real}"
            + (f", such as {missing[0]}" if missing else "")
        )
    second = _names(config.take_two) if config.take_two is not None else {}
    lacking = sorted({*wanted} - {*second}) if second else []
    if lacking or (config.take_two is not None and not second):
        raise DataError(f"{config.take_two} lacks {len(lacking) or 'all'} of the second takes")
    stems = sorted(wanted)

    def judge(index: int) -> list[Row]:
        stem = stems[index]
        real = read_clip(wanted[stem]).frames
        return list(_pairs(stem, real, read_clip(names[stem]).frames, second.get(stem)))

    found = shared(place, len(stems), judge, partial(progress, "judging"))
    if not place.is_main:
        return {}
    rows = [row for rows in found for row in rows]
    settings = {
        "suite": "physics", "weights": str(videos), "videos": len(wanted),
        "real": str(config.real), "take_two": str(config.take_two),
    }  # fmt: skip
    rows.sort(key=lambda row: row.group)  # stable: scenes stay in order
    return write(output, rows, settings=settings, estimates=_scores(rows, "truth"))


def _pairs(stem: str, real: np.ndarray, video: np.ndarray, take: Path | None) -> Iterator[Row]:
    still = np.repeat(real[:1], len(real), axis=0)
    for group, other in (("generated", video), ("still", still)):
        yield Row(group, stem, physics_iq.measure(real, other))
    if take is not None:
        yield Row("truth", stem, physics_iq.measure(real, read_clip(take).frames))


def _names(folder: Path) -> dict[str, Path]:
    """Stem -> file of the videos in a folder."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of videos")
    return {f.stem: f for f in sorted(folder.iterdir()) if f.suffix.lower() in SUFFIXES}


def _scores(rows: Sequence[Row], best: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Physics-IQ's score of each group, with intervals of a bootstrap over scenes.

    Empty where there is no second take to divide by.
    """
    tables: dict[str, list[Mapping[str, float]]] = {}
    for row in rows:
        tables.setdefault(row.group, []).append(row.values)
    if best not in tables:
        return {}
    count, found = len(tables[best]), {}
    chance = np.random.Generator(np.random.Philox(key=0))
    draws = chance.integers(0, count, (_RESAMPLES, count))
    means = {
        group: {
            name: np.array([one[name] for one in table])[draws].mean(1)
            for name in physics_iq.METRICS
        }
        for group, table in tables.items()
    }
    for group, table in tables.items():
        point = physics_iq.score(table, tables[best])
        spread = _resampled(means[group], means[best])
        low, high = np.quantile(spread, [0.025, 0.975]).tolist() if len(spread) else (point, point)
        found[group] = {"score": {"mean": point, "low": low, "high": high, "n": count}}
    return found


def _resampled(mine: Mapping[str, np.ndarray], best: Mapping[str, np.ndarray]) -> np.ndarray:
    """Scores of resamples; those in which no take moves have none."""
    usable = np.all([best[name] > 0 for name in physics_iq.METRICS[:3]], axis=0)
    ratio = np.mean([mine[n][usable] / best[n][usable] for n in physics_iq.METRICS[:3]], axis=0)
    return 100 * np.clip(ratio - (mine["mse"] - best["mse"])[usable], 0, 1)


SUITE = Suite(PhysicsConfig, run, ("score", *physics_iq.METRICS))
