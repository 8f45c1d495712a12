"""Drawing the videos of the benchmark: one folder, VBench's names, a seed for each video.

A seed follows from the run's seed, the prompt and the number of the sample, so neither ranks nor
subsets nor the order of prompts change a video. A stopped call is completed by the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opensora.errors import DataError
from opensora.evaluate import drawing
from opensora.evaluate.vbench.config import DrawingConfig
from opensora.evaluate.vbench.prompts import Entry, file_name, refuse_collisions
from opensora.infer.conditions import Reference
from opensora.infer.jobs import Job
from opensora.infer.pipeline import VideoPipeline
from opensora.runtime import ALONE, Runtime, address

STRIDE = 1000
"""Indices between two prompts in the records; more than samples of one prompt."""

FLICKERING = "temporal_flickering"


def samples_of(
    entries: Iterable[Entry], dimensions: Sequence[str], *, samples: int, flicker_samples: int
) -> dict[str, int]:
    """Prompt -> how many videos of it there should be."""
    counts: dict[str, int] = {}
    for entry in entries:
        filtered = FLICKERING in entry.dimensions and FLICKERING in dimensions
        count = max(samples, flicker_samples) if filtered else samples
        counts[entry.prompt] = max(count, counts.get(entry.prompt, 0))
    return counts


def seed_of(seed: int, prompt: str, sample: int) -> int:
    """The seed of one video: 53 bits, which JSON keeps exactly everywhere."""
    return address(seed, f"vbench {prompt}", sample) >> 10


def jobs(
    known: Sequence[Entry],
    counts: dict[str, int],
    seed: int,
    *,
    rewritten: Mapping[str, str] | None = None,
    pictures: Path | None = None,
) -> list[Job]:
    """What to draw.

    Args:
        known: all entries of the prompt file; a prompt's place in it names its jobs.
        counts: prompt -> samples, of the prompts that are wanted.
        rewritten: prompt -> what the model is told; the prompt itself by default.
        pictures: folder of the files that entries name, with which videos begin.

    Raises:
        DataError: a picture is not there.
    """
    places = {prompt: i for i, prompt in enumerate(dict.fromkeys(e.prompt for e in known))}
    work = []
    begins = _beginnings(known, counts, pictures) if pictures is not None else {}
    for prompt, count in counts.items():
        told = (rewritten[prompt],) if rewritten is not None else ()
        for sample in range(count):
            index, own = places[prompt] * STRIDE + sample, seed_of(seed, prompt, sample)
            work.append(Job(index, prompt, own, told, begins.get(prompt, ())))
    return work


def _beginnings(
    known: Sequence[Entry], counts: dict[str, int], folder: Path
) -> dict[str, tuple[Reference, ...]]:
    """Prompt -> the picture that its videos begin with."""
    begins = {}
    for entry in known:
        name = entry.picture
        if entry.prompt not in counts or entry.prompt in begins:
            continue
        if name is None or not (folder / name).is_file():
            raise DataError(
                f"the picture '{name}' of '{entry.prompt}' is not in {folder}: get VBench-I2V's "
                "pictures (its download_data.sh) and name the folder of the right proportions"
            )
        begins[entry.prompt] = (Reference(str(folder / name)),)
    return begins


def draw(
    pipeline: VideoPipeline,
    work: Sequence[Job],
    folder: Path,
    config: DrawingConfig,
    *,
    place: Runtime = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """`evaluate.drawing.draw` under VBench's names.

    Raises:
        DataError: a video does not decode to what was drawn, twice; or the file system ignores
            case and two prompts differ by nothing else.
        UsageError: the folder holds samples of other weights or settings.
    """
    refuse_collisions([job.prompt for job in work], folder)
    return drawing.draw(
        pipeline,
        work,
        folder,
        sampling=config.sampling,
        negative_prompt=config.negative_prompt,
        batch_size=config.batch_size,
        name=lambda job: file_name(job.prompt, job.index % STRIDE, ""),
        place=place,
        progress=progress,
    )
