"""Many prompts to a folder of files, with a record of how each was drawn.

`samples.jsonl` has one line a video. A stopped call is completed by the same call; a folder that
holds samples of other weights or settings is refused, because the two would be taken for one set.

A video's last bits depend on those that share its batch. So batches are those of all jobs in their
order, whichever ranks draw them; one of which a video is missing is drawn whole, and only what is
missing is written. Files are then the same after any kills on any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from opensora.disk import preflight
from opensora.errors import DataError, UsageError
from opensora.infer import records
from opensora.infer.choices import told
from opensora.infer.conditions import Given, Reference
from opensora.infer.jobs import Job
from opensora.infer.long import LongConfig, stream
from opensora.infer.pipeline import Callback, SamplingConfig, Shape, VideoPipeline
from opensora.infer.prompt_lines import words_of
from opensora.media.write import safe_name, slug, write_video
from opensora.runtime import ALONE, Runtime, address

Options = dict[str, Any]


def draw(
    pipeline: VideoPipeline,
    work: Sequence[Job],
    folder: str | Path,
    *,
    sampling: SamplingConfig,
    shape: Shape | None = None,
    negative_prompt: str = "",
    batch_size: int = 8,
    suffix: str = ".mp4",
    long: LongConfig | None = None,
    num_frames: int | None = None,
    picture_first: bool = False,
    progress: Callable[[int, int], None] | None = None,
    callback: Callback | None = None,
    name: Callable[[Job], str] = lambda job: safe_name(words_of(job.prompt), job.index),
    place: Runtime = ALONE,
    tell: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Draw the jobs that `folder` does not hold yet; returns the records of all of them.

    Args:
        batch_size: videos at a time; no video depends on it, but for rounding (see above).
        suffix: the format, one of `media.write.FORMATS`; .png holds the first frame.
        long: draws videos of `num_frames` in windows of `shape`, one after the other.
        picture_first: draw a picture from each prompt, then the video that begins with it.
        progress: called with (done, total) before the first and after every batch.
        callback: (step, latents, data estimate) after every step of a batch, as a pipeline's.
        name: of a job's file, without the suffix; no two jobs may share one.
        place: where several ranks are given the same jobs and folder, each draws its share of
            what is missing, or all of them draw each video where the pipeline has a team.
        tell: called with a line on what memory decided, if it did.

    Raises:
        UsageError: the shape does not fit the model, or the folder holds samples of other
            weights, settings or prompts.
        DataError: ranks do not see the same folder.
        StorageError: the folder takes no files, which is found out before anything is drawn.
    """
    folder, shape = Path(folder), shape or pipeline.shape
    pipeline.latent_shape(shape)
    options: Options = {"sampling": sampling, "shape": shape, "negative_prompt": negative_prompt}
    settings = settings_of(
        pipeline, **options, long=long, num_frames=num_frames, picture_first=picture_first
    )
    options |= {} if callback is None else {"callback": callback}
    _check(work, long=long is not None, picture_first=picture_first)
    size = min(1 if long is not None else batch_size, len(work))
    pipeline, settings["tiled"] = _settled(pipeline, folder, shape, size, place, tell)
    together = place.world_size > 1 and pipeline.team is not None
    report = progress or (lambda done, total: None)
    # No rank draws before all have looked; what the first one sees decides who draws what.
    done = place.gather_objects(records.finished(folder, settings, work, suffix))[0]
    batches = _unfinished(work, done, size)
    batches = batches if together else batches[place.rank :: place.world_size]
    report(len(done), len(work))
    writes = place.is_main or not together
    if writes and batches:
        preflight(folder)
        records.mend(folder / records.RECORD_NAME)
    for batch in batches:
        if long is not None:
            videos = [_long(pipeline, batch[0], long, num_frames or shape.num_frames, options)]
        else:
            videos = _short(pipeline, batch, picture_first, options)
        for job, frames in zip(batch, videos, strict=True):
            if job.index in done:
                continue
            record = {"file": name(job) + suffix, **job.record, **settings}
            if writes:
                _write(folder, record, frames, shape.fps)
            else:
                deque(frames, maxlen=0)  # a long video is drawn while its frames are fetched
            done[job.index] = record
        report(len(done), len(work))
    if place.world_size > 1 and not together:
        place.barrier()
        done = _all_there(work, records.finished(folder, settings, work, suffix), folder)
        report(len(done), len(work))
    return [done[job.index] for job in work]


def _write(folder: Path, record: dict[str, Any], frames: Iterable[np.ndarray], fps: float) -> None:
    """A video, and then its record."""
    path = folder / record["file"]
    write_video(path, islice(frames, 1) if path.suffix == ".png" else frames, fps=fps)
    records.append(folder / records.RECORD_NAME, record)


def _settled(
    pipeline: VideoPipeline,
    folder: Path,
    shape: Shape,
    rows: int,
    place: Runtime,
    tell: Callable[[str], None] | None,
) -> tuple[VideoPipeline, bool]:
    """The pipeline with decoding in tiles or not, as the folder's samples were, or as memory says,
    for all of them and on all ranks alike: edges of tiles change pixels a little."""
    if pipeline.savings.decode.tile != "auto":
        return pipeline, pipeline.savings.decode.tile
    known = next((record["tiled"] for record in records.lines(folder / records.RECORD_NAME)), None)
    ways = place.gather_objects(pipeline.decoding(shape, rows, tiled=known))
    way = max(ways, key=lambda way: (way.tile is True, way.chunk is not None))
    if tell and told(way):
        tell(told(way))
    pipeline = copy(pipeline)
    pipeline.savings = pipeline.savings.model_copy(update={"decode": way})
    return pipeline, way.tile is True


def settings_of(
    pipeline: VideoPipeline,
    *,
    sampling: SamplingConfig,
    shape: Shape,
    negative_prompt: str = "",
    long: LongConfig | None = None,
    num_frames: int | None = None,
    picture_first: bool = False,
) -> dict[str, Any]:
    """What all samples of a call share, as JSON has it; arguments are those of `draw`."""
    settings: dict[str, Any] = {"weights": pipeline.fingerprint}
    if pipeline.weaker is not None:
        settings["weaker"] = pipeline.weaker.fingerprint
    settings |= {
        "sampling": sampling.model_dump(mode="json"),
        "negative_prompt": negative_prompt,
        "shape": asdict(shape),
    }
    if long is not None:
        settings |= {"long": long.model_dump(mode="json"), "num_frames": num_frames}
    if picture_first:
        settings["picture_first"] = True
    return settings


def own_folder(work: Sequence[Job], settings: dict[str, Any], suffix: str) -> str:
    """A name for a folder that holds these samples and no others: the first prompt and a digest.

    The same call gets the same name, so that it goes on where it stopped.
    """
    whole = json.dumps([suffix, settings, [job.record for job in work]], sort_keys=True)
    digest = hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{slug(words_of(work[0].prompt))}-{digest}".lstrip("-")


def _all_there(work: Sequence[Job], done: records.Records, folder: Path) -> records.Records:
    absent = [job for job in work if job.index not in done]
    if absent:
        raise DataError(
            f"{folder} lacks {len(absent)} videos that ranks have drawn: all ranks need the same "
            "file system; the same command draws what is missing"
        )
    return done


def _check(work: Sequence[Job], *, long: bool, picture_first: bool) -> None:
    """Refuse what would be left out in silence."""
    for job in work:
        later = len(job.prompts) > 1 or any(reference.window for reference in job.references)
        if later and not long:
            raise UsageError(
                f"'{job.prompt}' says something of later windows: ask for a long video"
            )
        if picture_first and (long or job.references):
            raise UsageError("a first picture is drawn for short videos without given frames")


def _short(
    pipeline: VideoPipeline, batch: Sequence[Job], picture_first: bool, options: dict[str, Any]
) -> list[np.ndarray]:
    """The frames of a batch of videos of the shape's length."""
    prompts, seeds = [job.prompts[0] for job in batch], [job.seed for job in batch]
    given = [_load(job.references, options["shape"].fps) for job in batch]
    if picture_first:
        still = {**options, "shape": replace(options["shape"], num_frames=1)}
        # Of other noise than the video that it begins.
        others = [address(seed, "picture") for seed in seeds]
        given = [[Given(p.frames)] for p in pipeline(prompts, seeds=others, **still)]
    if any(given):
        options = {**options, "given": given}
    return [video.frames for video in pipeline(prompts, seeds=seeds, **options)]


def _load(references: Sequence[Reference], fps: float, window: int = 0) -> list[Given]:
    return [reference.load(fps=fps) for reference in references if reference.window == window]


def _long(
    pipeline: VideoPipeline,
    job: Job,
    long: LongConfig,
    num_frames: int,
    options: dict[str, Any],
) -> Iterator[np.ndarray]:
    """The frames of a long video, each as soon as it is known."""
    last = max((reference.window for reference in job.references), default=-1)
    fps = options["shape"].fps
    given = [_load(job.references, fps, window) for window in range(last + 1)]
    options = {**options, "seed": job.seed, "given": given}
    pieces = stream(pipeline, job.prompts, num_frames=num_frames, long=long, **options)
    return chain.from_iterable(pieces)


def _unfinished(work: Sequence[Job], done: records.Records, size: int) -> list[Sequence[Job]]:
    """The batches of all jobs, of which a video is missing."""
    return [b for b in _batches(work, size) if any(job.index not in done for job in b)]


def _batches(items: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
