"""Finds under one folder everything that a report can show, by the names that runs use.

A run is a folder with `metrics.jsonl`; samples lie beside `samples.jsonl`, scores in
`scores.json`, data beside `manifest.csv`, commands in `commands.json` or `commands.log`. Any of
them may be missing, half-written or damaged. Links to folders are not followed, and checkpoints
are listed, not opened.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opensora import store
from opensora.errors import OpensoraError
from opensora.report import estimates, manifests
from opensora.report.findings import (
    MEDIA_SUFFIXES,
    Checkpoint,
    Findings,
    Gallery,
    Run,
    Sample,
    Scores,
    Tree,
)
from opensora.report.reading import (
    Notes,
    finite,
    mapping,
    number,
    read_commands,
    read_document,
    read_lines,
)
from opensora.report.series import LARGEST, Collector, Series

MAX_DEPTH = 8
MAX_INCIDENTS = 20
MAX_METRICS = 200

_CLOSED = {"checkpoints", "tensorboard", "wandb", "node_modules"}
_STEP = re.compile(r"^step-(\d{1,15})$")
_INDEX = re.compile(r"^(\d{1,9})(?:-|$)")


def gather(root: Path) -> Findings:
    """Read everything under `root` that is meant for people."""
    root = root.resolve()
    notes = Notes(root)
    folders = list(_folders(root, notes))
    scores = [_scores(folder, names, notes) for folder, names in folders]
    galleries = [_gallery(folder, names, notes) for folder, names in folders]
    runs = [_run(folder, notes) for folder, names in folders if _is_run(names)]
    tables = [(f / name) for f, names in folders for name in sorted(names & set(manifests.NAMES))]
    tables = dict.fromkeys([*tables, *(path for run in runs for path in _trained_on(run, root))])
    datasets = [manifests.read(path, notes) for path in tables]
    found_galleries = [gallery for gallery in galleries if gallery is not None]
    return Findings(
        root=root,
        runs=tuple(runs),
        galleries=tuple(sorted(found_galleries, key=_interest)),
        scores=tuple(found for found in scores if found is not None),
        datasets=tuple(dataset for dataset in datasets if dataset is not None),
        commands=tuple(row for folder, _ in folders for row in read_commands(folder, notes)),
        environment=read_document(root / "environment.json", notes),
        newest=max((_newest(folder, names) for folder, names in folders), default=0.0),
        notes=notes,
    )


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts 'step-9' before 'step-10'."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d{1,15})", name)
    ]


def _folders(root: Path, notes: Notes) -> Iterator[tuple[Path, set[str]]]:
    """Every folder that may hold something, the outer ones first, with its file names."""

    def refused(error: OSError) -> None:
        notes.add(Path(error.filename or root), f"cannot be opened: {error.strerror}")

    for parent, subfolders, files in os.walk(root, onerror=refused):
        folder = Path(parent)
        deep = len(folder.relative_to(root).parts) >= MAX_DEPTH
        kept = [
            name
            for name in subfolders
            if not (name.startswith(".") or name in _CLOSED or _STEP.match(name))
        ]
        subfolders[:] = [] if deep else sorted(kept, key=natural_key)
        yield folder, set(files)


def _newest(folder: Path, names: set[str]) -> float:
    """When the newest of the files that a report reads was written, in seconds since 1970."""
    telling = {"metrics.jsonl", "scores.json", "samples.jsonl", *manifests.NAMES}
    times = [0.0]
    for name in names & telling:
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times)


def _is_run(names: set[str]) -> bool:
    """A run that has recorded something, or is about to."""
    return "metrics.jsonl" in names or {"config.json", "environment.json"} <= names


def _trained_on(run: Run, root: Path) -> Iterator[Path]:
    """The manifests that a run's config names, as far as they lie below the root."""
    data = mapping(run.config.get("data"))
    for name in (data.get("manifest"), data.get("validation")):
        if isinstance(name, str) and "\0" not in name and Path(name).suffix in (".csv", ".parquet"):
            path = Path(name).resolve()
            if path.is_relative_to(root) and path.is_file():
                yield path


def _interest(gallery: Gallery) -> tuple[bool, bool]:
    """Judged samples first, those of untrained controls last."""
    judged = any(sample.is_right is not None for sample in gallery.samples)
    return not judged, "untrained" in gallery.path.name


def _scores(folder: Path, names: set[str], notes: Notes) -> Scores | None:
    if "scores.json" not in names:
        return None
    path = folder / "scores.json"
    document = read_document(path, notes)
    scores = estimates.parse(path, document)
    if document and not scores.groups:
        notes.add(path, "holds no scores")
    return scores if scores.groups else None


def _run(folder: Path, notes: Notes) -> Run:
    config = read_document(folder / "config.json", notes)
    incidents: list[Tree] = []
    num_incidents = 0
    for record in read_lines(folder / "incidents.jsonl", notes):
        num_incidents += 1
        if len(incidents) < MAX_INCIDENTS:
            incidents.append(record)
    return Run(
        path=folder,
        config=config,
        environment=read_document(folder / "environment.json", notes),
        curves=_curves(folder / "metrics.jsonl", notes),
        incidents=tuple(incidents),
        num_incidents=num_incidents,
        samples=_samples_by_step(folder / "samples", config, notes),
        checkpoints=_checkpoints(folder / "checkpoints"),
    )


def _curves(path: Path, notes: Notes) -> dict[str, dict[str, Series]]:
    """Every numeric metric of a metrics file as a curve, by kind of record."""
    collected: dict[str, dict[str, Collector]] = defaultdict(dict)
    homeless = crowded = 0
    for record in read_lines(path, notes):
        step = finite(record.pop("step", None))
        if step is None or not 0 <= step <= 1e15:
            homeless += 1
            continue
        metrics = collected[str(record.pop("kind", "train"))]
        record.pop("time", None)
        for name, entry in record.items():
            value = number(entry)
            if value is None:
                continue
            if name not in metrics and sum(map(len, collected.values())) >= MAX_METRICS:
                crowded += 1
                continue
            metrics.setdefault(name, Collector()).add(step, value)
    if homeless:
        notes.add(path, f"{homeless} records have no usable 'step', and are left out")
    if crowded:
        notes.add(path, f"only the first {MAX_METRICS} metrics are read; {crowded} values are not")
    return {
        kind: {name: collector.series() for name, collector in metrics.items()}
        for kind, metrics in collected.items()
    }


def _checkpoints(folder: Path) -> tuple[Checkpoint, ...]:
    if not folder.is_dir():
        return ()
    found = []
    for entry in sorted(folder.iterdir(), key=lambda path: natural_key(path.name)):
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        num_bytes = None
        try:
            if store.is_complete(entry):
                num_bytes = sum(r.size for r in store.read_manifest(entry).files.values())
        except OpensoraError:
            num_bytes = None
        found.append(Checkpoint(entry.name, num_bytes))
    return tuple(found)


def _gallery(folder: Path, names: set[str], notes: Notes) -> Gallery | None:
    """A folder's samples: as `samples.jsonl` lists them, or the files of a `samples` folder."""
    if "samples.jsonl" in names:
        samples = _listed(folder, notes)
    elif folder.name == "samples":
        samples = [_unlisted(folder / name, ()) for name in _media(names)]
    else:
        return None
    return Gallery(folder, tuple(samples)) if samples else None


def _listed(folder: Path, notes: Notes) -> list[Sample]:
    path = folder / "samples.jsonl"
    samples = []
    for row in read_lines(path, notes):
        name = row.get("file")
        if not isinstance(name, str) or not name or "\0" in name:
            notes.add(path, f"a row has no usable 'file': {str(row)[:80]}")
            continue
        seed = finite(row.get("seed"))
        answers = {str(k): finite(v) for k, v in mapping(row.get("scores")).items()}
        samples.append(
            Sample(
                file=folder / name,
                prompt=str(row.get("prompt", "")),
                seed=None if seed is None else int(seed),
                checkpoint=_drawn_by(row),
                sampling=mapping(row.get("sampling")) | mapping(row.get("shape")),
                scores={k: v for k, v in answers.items() if v is not None and abs(v) <= LARGEST},
                given=_given(row),
            )
        )
    return samples


def _given(row: Tree) -> tuple[str, ...]:
    """The names of the files whose frames a sample was given."""
    references = row.get("references")
    references = references if isinstance(references, list) else []
    paths = [mapping(reference).get("path") for reference in references]
    return tuple(dict.fromkeys(Path(path).name for path in paths if isinstance(path, str)))


def _drawn_by(row: Tree) -> str:
    """A checkpoint's name, or the first letters of its weights' digest."""
    if row.get("checkpoint"):
        return str(row["checkpoint"])
    return f"weights {str(row['weights'])[:12]}" if row.get("weights") else ""


def _samples_by_step(folder: Path, config: Tree, notes: Notes) -> dict[int, tuple[Sample, ...]]:
    """What a run drew while it was training, by step."""
    prompts = mapping(config.get("samples")).get("prompts")
    prompts = prompts if isinstance(prompts, list) else []
    by_step: dict[int, tuple[Sample, ...]] = {}
    entries = sorted(folder.iterdir(), key=lambda p: p.name) if folder.is_dir() else []
    for entry in entries:
        match = _STEP.match(entry.name)
        if match is None or not entry.is_dir() or entry.is_symlink():
            continue
        names = {path.name for path in entry.iterdir() if path.is_file()}
        if "samples.jsonl" in names:
            samples = _listed(entry, notes)
        else:
            samples = [_unlisted(entry / name, prompts) for name in _media(names)]
        if samples:
            by_step[int(match[1])] = tuple(samples)
    return dict(sorted(by_step.items()))


def _media(names: set[str]) -> list[str]:
    """The names of videos and pictures; a PNG with a video's name is that video's still."""
    videos = {Path(name).stem for name in names if Path(name).suffix.lower() != ".png"}
    return sorted(
        (
            name
            for name in names
            if Path(name).suffix.lower() in MEDIA_SUFFIXES
            and not (name.lower().endswith(".png") and Path(name).stem in videos)
        ),
        key=natural_key,
    )


def _unlisted(path: Path, prompts: Any) -> Sample:
    """A sample of which only the file name is known: '0003-a-red-circle.mp4'."""
    match = _INDEX.match(path.stem)
    if match is not None and int(match[1]) < len(prompts):
        return Sample(path, str(prompts[int(match[1])]))
    words = path.stem[match.end() :] if match is not None else path.stem
    return Sample(path, words.replace("-", " ").replace("_", " ").strip() or path.stem)
