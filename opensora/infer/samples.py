"""Many prompts to a folder of files, with a record of how each was drawn.

`samples.jsonl` has one line a video. A stopped call is completed by the same call; a folder that
holds samples of other weights or settings is refused, because the two would be taken for one set.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opensora.errors import DataError, UsageError, did_you_mean
from opensora.infer.pipeline import SamplingConfig, Shape, VideoPipeline
from opensora.media.write import safe_name, write_video
from opensora.runtime import ALONE, Runtime

RECORD_NAME = "samples.jsonl"


@dataclass(frozen=True)
class Job:
    """One video to draw; `index` names its file."""

    index: int
    prompt: str
    seed: int


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a text file, one a line, or from the column `text` of a CSV.

    Empty lines are left out.

    Raises:
        UsageError: the file cannot be read, or has no prompts.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = _column(text, path) if path.suffix.lower() == ".csv" else text.split("\n")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"the prompts in {path} cannot be read: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{path} holds no prompts")
    return prompts


def _column(text: str, path: Path) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    columns = list(rows.fieldnames or [])
    if "text" not in columns:
        hint = did_you_mean("text", columns)
        raise UsageError(f"{path} has no column 'text' with the prompts.{hint}")
    return [row["text"] or "" for row in rows]


def jobs(prompts: Sequence[str], *, seed: int, per_prompt: int = 1) -> list[Job]:
    """One job for each prompt and repetition; every sample has a seed of its own."""
    return [
        Job(index, prompt, seed + index)
        for index, prompt in enumerate(p for p in prompts for _ in range(per_prompt))
    ]


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
    progress: Callable[[int, int], None] | None = None,
    name: Callable[[Job], str] = lambda job: safe_name(job.prompt, job.index),
    place: Runtime = ALONE,
) -> list[dict[str, Any]]:
    """Draw the jobs that `folder` does not hold yet; returns the records of all of them.

    Args:
        batch_size: videos at a time; no video depends on it.
        suffix: the format, one of `media.write.FORMATS`; .png holds the first frame.
        progress: called with (done, total) before the first and after every batch.
        name: of a job's file, without the suffix; no two jobs may share one.
        place: where several ranks are given the same jobs and folder, each draws its share of
            what is missing, and all of them return all records.

    Raises:
        UsageError: the shape does not fit the model, or the folder holds samples of other
            weights, settings or prompts.
    """
    folder, shape = Path(folder), shape or pipeline.shape
    pipeline.latent_shape(shape)
    settings = {
        "weights": pipeline.fingerprint,
        "sampling": sampling.model_dump(mode="json"),
        "shape": asdict(shape),
        "negative_prompt": negative_prompt,
    }
    wanted = {job.index: job for job in work}
    done = _finished(folder, settings, wanted, suffix)
    missing = [job for job in work if job.index not in done]
    place.barrier()  # no rank draws before all of them have seen the same folder
    missing = missing[place.rank :: place.world_size]
    if progress:
        progress(len(done), len(work))
    _mend(folder / RECORD_NAME)
    for batch in _batches(missing, batch_size):
        videos = pipeline(
            [job.prompt for job in batch],
            seeds=[job.seed for job in batch],
            shape=shape,
            sampling=sampling,
            negative_prompt=negative_prompt,
        )
        for job, video in zip(batch, videos, strict=True):
            file = name(job) + suffix
            frames = video.frames[:1] if suffix == ".png" else video.frames
            write_video(folder / file, frames, fps=shape.fps)
            record = {"file": file, **asdict(job), **settings}
            with open(folder / RECORD_NAME, "a", encoding="utf-8") as log:
                log.write(json.dumps(record, ensure_ascii=False) + "\n")
            done[job.index] = record
        if progress:
            progress(len(done), len(work))
    if place.world_size > 1:
        place.barrier()
        done = _finished(folder, settings, wanted, suffix)
        absent = [job for job in work if job.index not in done]
        if absent:
            raise DataError(
                f"{folder} lacks {len(absent)} videos that ranks have drawn: all ranks need the "
                "same file system; the same command draws what is missing"
            )
    return [done[job.index] for job in work]


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a folder of samples, in the order of their index.

    Raises:
        DataError: the folder has none.
    """
    # A video that was lost has been drawn again; its last record counts.
    records = {record["index"]: record for record in _lines(Path(folder) / RECORD_NAME)}
    if not records:
        raise DataError(f"{folder} holds no samples: {RECORD_NAME} is missing or empty")
    return [records[index] for index in sorted(records)]


def _finished(
    folder: Path, settings: dict[str, Any], wanted: dict[int, Job], suffix: str
) -> dict[int, dict[str, Any]]:
    """Index -> record of the wanted videos that are there already."""
    done = {}
    for record in _lines(folder / RECORD_NAME):
        differing = [key for key, value in settings.items() if record.get(key) != value]
        if Path(record["file"]).suffix != suffix:
            differing.append("format")
        job = wanted.get(record["index"])
        if job is not None and (record["prompt"], record["seed"]) != (job.prompt, job.seed):
            differing.append("prompt or seed")
        if differing:
            raise UsageError(
                f"{folder} holds samples drawn differently ({', '.join(differing)}): choose "
                "another folder, or remove it"
            )
        if job is not None and (folder / record["file"]).is_file():
            done[record["index"]] = record
    return done


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records; a line may be torn by a crash, and its video is then drawn again."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


def _mend(path: Path) -> None:
    """End a line that was torn, so that the next record does not become part of it."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with open(path, "ab") as log:
            log.write(b"\n")


def _batches(items: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
