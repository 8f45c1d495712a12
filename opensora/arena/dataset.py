"""Scenes on disk: real h264 files, a manifest that the data room reads, and the truth beside it.

    videos/train-000000.mp4   manifest.csv   truth.jsonl   scenes.json (what the folder holds)

Running again adds what is missing; a folder never mixes two distributions. Also the prompts that
models are judged on.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from opensora.arena.draw import render
from opensora.arena.grammar import Promise
from opensora.arena.place import Dice
from opensora.arena.scenes import SceneConfig, Split, sample
from opensora.arena.truth import record
from opensora.errors import DataError, UsageError
from opensora.runtime import address

SAMPLER = 1
"""Counts changes of `scenes.sample` that make another scene of the same config and index."""

COLUMNS = ("id", "path", "text", "num_frames", "height", "width", "fps")

_PATIENCE = 400  # scenes without a new caption after which there is taken to be none


def write_dataset(
    out_dir: str | os.PathLike[str],
    config: SceneConfig,
    *,
    seed: int,
    count: int,
    split: Split = "train",
    crf: int = 12,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Render scenes 0 .. count - 1 of a split to `out_dir` and return the path of the manifest.

    Files that exist are kept (each appears whole or not at all), so a stopped call is completed by
    the same call, and a larger `count` makes a dataset bigger. `manifest.csv` and `truth.jsonl`
    are replaced at the end, each in one step; paths in the manifest are relative to its folder.

    Args:
        crf: x264 quality, 0 lossless to 51; 12 leaves no visible loss.
        workers: processes that render; 0 renders in this one.
        progress: called with (done, count) after each file, in this process.

    Raises:
        UsageError: when `out_dir` holds scenes of another config, seed, split or sampler.
    """
    if count < 1:
        raise UsageError(f"count={count}: render at least one scene")
    out = Path(out_dir)
    (out / "videos").mkdir(parents=True, exist_ok=True)
    _claim(out, config, seed, split)
    missing = [i for i in range(count) if not _video(out, split, i).exists()]
    done = count - len(missing)
    if progress:
        progress(done, count)
    write_one = partial(_write_one, out=out, config=config, seed=seed, split=split, crf=crf)
    for _ in _each(write_one, missing, workers):
        done += 1
        if progress:
            progress(done, count)
    table, truths = io.StringIO(), io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for index in range(count):
        s = sample(config, seed, index, split)
        path = _video(out, split, index)
        name = path.relative_to(out).as_posix()
        writer.writerow((path.stem, name, s.caption, s.frames, s.height, s.width, s.fps))
        truths.write(json.dumps({"id": path.stem, **record(s)}, ensure_ascii=False) + "\n")
    _replace(out / "truth.jsonl", truths.getvalue())
    _replace(out / "manifest.csv", table.getvalue())
    return out / "manifest.csv"


def prompts(
    config: SceneConfig,
    seed: int,
    count: int,
    *,
    num_objects: int = 1,
    split: Split = "heldout",
) -> list[str]:
    """`count` prompts for evaluation, balanced over colour, shape and motion.

    They are distinct as long as the grammar has that many under `config`; after that they come
    again in the same order, for another seed makes another sample of the same prompt.

    Raises:
        UsageError: for a split or number of objects that the config does not have.
    """
    if num_objects not in config.num_objects:
        known = sorted(config.num_objects)
        raise UsageError(f"num_objects={num_objects}: this config has {known}")
    only = config.model_copy(update={"num_objects": {num_objects: 1.0}})
    pool: dict[str, Promise] = {}
    index = newest = 0
    while len(pool) < 8 * count and index - newest < max(_PATIENCE, 2 * len(pool)):
        scene = sample(only, address(seed, "arena prompts"), index, split)
        newest = newest if scene.caption in pool else index
        pool.setdefault(scene.caption, scene.promise)
        index += 1
    order = _balanced(pool, min(count, len(pool)), Dice(address(seed, "arena prompt order")))
    return [order[number % len(order)] for number in range(count)]


def _balanced(pool: dict[str, Promise], count: int, dice: Dice) -> list[str]:
    """Captions taken one by one, each time the one whose traits are rarest so far."""
    traits = {text: _traits(promise) for text, promise in pool.items()}
    luck = {text: dice.uniform(0, 1) for text in pool}
    seen: Counter[str] = Counter()
    chosen: list[str] = []
    left = set(pool)
    while len(chosen) < count:
        text = min(left, key=lambda t: (sum(seen[x] for x in traits[t]) / len(traits[t]), luck[t]))
        left.remove(text)
        chosen.append(text)
        seen.update(traits[text])
    return chosen


def _traits(promise: Promise) -> list[str]:
    """What has to be balanced: each object's colour, shape, motion, and its colour with motion."""
    return [
        trait
        for thing in promise.objects
        for trait in (
            thing.colour,
            thing.shape,
            thing.motion,
            f"{thing.colour} {thing.motion}",
            f"words {thing.size} {thing.speed}",
        )
    ]


def _write_one(
    index: int, *, out: Path, config: SceneConfig, seed: int, split: Split, crf: int
) -> None:
    from opensora.media.write import write_video

    scene = sample(config, seed, index, split)
    write_video(_video(out, split, index), render(scene), fps=config.fps, crf=crf)


def _each(work: Callable[[int], None], indices: list[int], workers: int) -> Iterator[None]:
    """`work` done on every index, here or in fresh processes; yields after each."""
    if workers < 1 or len(indices) < 2:
        for index in indices:
            yield work(index)
        return
    # Spawned, not forked: a fork of a process that has run torch or a decoder can hang.
    with multiprocessing.get_context("spawn").Pool(min(workers, len(indices))) as pool:
        yield from pool.imap_unordered(work, indices, chunksize=8)


def _video(out: Path, split: Split, index: int) -> Path:
    return out / "videos" / f"{split}-{index:06d}.mp4"


def _claim(out: Path, config: SceneConfig, seed: int, split: Split) -> None:
    """Note what the folder holds, or refuse a folder that holds something else."""
    note = out / "scenes.json"
    scenes = {"seed": seed, "split": split, "config": config.model_dump(mode="json")}
    wanted = {"sampler": SAMPLER, **scenes}
    text = json.dumps(wanted, indent=2, sort_keys=True) + "\n"
    if not note.exists():
        _replace(note, text)
        return
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{note} cannot be read ({error}): delete it") from None
    if found != json.loads(text):
        raise UsageError(
            f"{out} holds scenes of another config, seed, split or sampler (see {note.name}): "
            "write to another folder, or delete this one"
        )


def _replace(path: Path, text: str) -> None:
    """Write a text file in one step: a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
