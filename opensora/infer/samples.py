"""Many prompts to a folder of files, with a record of how each was drawn.

`samples.jsonl` has one line a video. A stopped call is completed by the same call; a folder that
holds samples of other weights or settings is refused, because the two would be taken for one set.

A video's last bits depend on those that share its batch. So batches are those of all jobs in their
order, whichever ranks draw them; one of which a video is missing is drawn whole, and only what is
missing is written. Files are then the same after any kills on any number of ranks.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from opensora.disk import preflight
from opensora.errors import DataError, UsageError, did_you_mean
from opensora.infer.choices import told
from opensora.infer.conditions import Given, Reference
from opensora.infer.long import LongConfig, stream
from opensora.infer.pipeline import Callback, SamplingConfig, Shape, VideoPipeline
from opensora.infer.prompt_lines import words_of
from opensora.media.write import safe_name, slug, write_video
from opensora.runtime import ALONE, Runtime, address

RECORD_NAME = "samples.jsonl"
PROMPT_FILES = (".txt", ".csv")
Options = dict[str, Any]
Records = dict[int, dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One video to draw; `index` names its file.

    Attributes:
        prompt: as it was written; names the file.
        told: what the model is told, one for each window of a long video; the prompt by default.
        references: files whose frames are given.
    """

    index: int
    prompt: str
    seed: int
    told: tuple[str, ...] = ()
    references: tuple[Reference, ...] = ()

    @property
    def prompts(self) -> tuple[str, ...]:
        """What the model is told."""
        return self.told or (self.prompt,)

    @property
    def record(self) -> dict[str, Any]:
        """The job as a line of the record has it; what it does not use is left out. Files are named
        with a digest, so that another picture of the same name is not taken for it.

        Raises:
            DataError: a file cannot be read.
        """
        tree = {key: value for key, value in asdict(self).items() if value != ()}
        if self.references:
            tree["references"] = [{**asdict(r), "sha256": r.sha256} for r in self.references]
        return json.loads(json.dumps(tree))


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a text file, one a line, or from the column `text` of a CSV.

    Empty lines are left out.

    Raises:
        UsageError: the file cannot be read, or has no prompts.
    """
    path = Path(path)
    if path.suffix.lower() in (".json", ".jsonl", ".parquet", ".yaml", ".yml"):
        raise UsageError(f"{path}: prompts are read from a .txt, one a line, or a .csv")
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = _column(text, path) if path.suffix.lower() == ".csv" else text.split("\n")
    except UnicodeDecodeError:
        raise UsageError(f"the prompts in {path} cannot be read: save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"the prompts in {path} cannot be read: {error.strerror}") from None
    except csv.Error as error:
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
        if len(columns) == 1 and re.search(r"[;\t]", columns[0]):
            hint = " Separate columns by commas."
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
    size = 1 if long is not None else batch_size
    rows = min(size, len(work))
    pipeline, settings["tiled"] = _settled(pipeline, folder, shape, rows, place, tell)
    together = place.world_size > 1 and pipeline.team is not None
    report = progress or (lambda done, total: None)
    wanted = {job.index: job for job in work}
    # No rank draws before all have looked; what the first one sees decides who draws what.
    done = place.gather_objects(_finished(folder, settings, wanted, suffix))[0]
    batches = _unfinished(work, done, size)
    batches = batches if together else batches[place.rank :: place.world_size]
    report(len(done), len(work))
    writes = place.is_main or not together
    if writes and batches:
        preflight(folder)
        _mend(folder / RECORD_NAME)
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
                shown = islice(frames, 1) if suffix == ".png" else frames
                write_video(folder / record["file"], shown, fps=shape.fps)
                _append(folder / RECORD_NAME, record)
            else:
                deque(frames, maxlen=0)  # a long video is drawn while its frames are fetched
            done[job.index] = record
        report(len(done), len(work))
    if place.world_size > 1 and not together:
        place.barrier()
        done = _all_there(work, _finished(folder, settings, wanted, suffix), folder)
        report(len(done), len(work))
    return [done[job.index] for job in work]


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
    known = next((record["tiled"] for record in _lines(folder / RECORD_NAME)), None)
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


def _all_there(work: Sequence[Job], done: Records, folder: Path) -> Records:
    absent = [job for job in work if job.index not in done]
    if absent:
        raise DataError(
            f"{folder} lacks {len(absent)} videos that ranks have drawn: all ranks need the same "
            "file system; the same command draws what is missing"
        )
    return done


def _append(path: Path, record: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as log:
        log.write(json.dumps(record, ensure_ascii=False) + "\n")


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
        if job is not None and any(record.get(key) != value for key, value in job.record.items()):
            differing.append("prompt or seed, or given frames")
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
            yield {"tiled": False, **json.loads(line)}  # older records do not say


def _mend(path: Path) -> None:
    """End a line that was torn, so that the next record does not become part of it."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with open(path, "ab") as log:
            log.write(b"\n")


def _unfinished(work: Sequence[Job], done: Records, size: int) -> list[Sequence[Job]]:
    """The batches of all jobs, of which a video is missing."""
    return [b for b in _batches(work, size) if any(job.index not in done for job in b)]


def _batches(items: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
