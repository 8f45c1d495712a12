"""Checkpoints: everything a run needs to go on as if it had not stopped, in one digested folder.

`step-000500/` holds weights, EMA, optimizer and frozen parts as safetensors, the trainer's progress
and the resolved config as JSON. Nothing is unpickled. The store's manifest is the commit point.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora import store
from opensora.config import AnyConfig, validate
from opensora.errors import CheckpointError, StorageError, UsageError

KIND = "checkpoint"
CONFIG_NAME = "config.json"
PROGRESS_NAME = "progress.json"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """The state of a run between two steps.

    Attributes:
        step: how many steps are done.
        config: the resolved config as JSON text.
        weights: the task's modules.
        ema: averages of the trained parameters, empty when none are kept.
        optimizer: state per parameter, as the engine names it.
        frozen: parts that are used but not trained, such as the VAE of a latent model.
        progress: the trainer's JSON.
    """

    step: int
    config: str
    weights: Tensors
    ema: Tensors = field(default_factory=dict)
    optimizer: Tensors = field(default_factory=dict)
    frozen: Tensors = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)


def save(root: str | Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Commit a snapshot under `root`, point `latest` at it, and prune to the newest `keep`.

    Raises:
        StorageError: the disk is full or failing; earlier checkpoints are untouched.
    """
    root = Path(root)
    path = root / f"step-{snapshot.step:06d}"
    with store.write(path, kind=KIND, meta={"step": snapshot.step}, replace=True) as folder:
        for name in ("weights", "ema", "optimizer", "frozen"):
            tensors = getattr(snapshot, name)
            if tensors:
                _write(tensors, folder / f"{name}.safetensors")
        (folder / CONFIG_NAME).write_text(snapshot.config, encoding="utf-8")
        progress = json.dumps(snapshot.progress, indent=1, ensure_ascii=False)
        (folder / PROGRESS_NAME).write_text(progress, encoding="utf-8")
    store.set_pointer(root, path.name)
    store.prune(root, keep, kind=KIND)
    return path


def _write(tensors: Tensors, path: Path) -> None:
    own = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    try:
        save_file(_unshared(own), path)
    except SafetensorError as error:  # what it says of a disk that refuses has no errno
        raise StorageError(f"{path} cannot be written: {error}") from None


def _unshared(tensors: Tensors) -> Tensors:
    """Tensors that share memory, copied: safetensors stores each on its own."""
    seen: set[int] = set()
    result = {}
    for name, value in tensors.items():
        pointer = value.untyped_storage().data_ptr()
        result[name] = value.clone() if pointer in seen else value
        seen.add(pointer)
    return result


def find(path: str | Path) -> Path:
    """The checkpoint that a user means by a path: a checkpoint, a run, or its checkpoints folder.

    Raises:
        CheckpointError: when there is none, saying what was looked at.
    """
    path = Path(path)
    if path.name == store.POINTER_NAME:
        path = path.parent
    if (path / store.MANIFEST_NAME).is_file():
        return path
    for root in (path / "checkpoints", path):
        found = committed(root)
        if found:
            return found[-1]
    state = "holds no complete checkpoint" if path.exists() else "does not exist"
    raise CheckpointError(
        f"{path} {state}: give a run folder, its checkpoints/ or one checkpoints/step-N/"
    )


def committed(root: str | Path) -> list[Path]:
    """The checkpoints under `root` that were once written whole, by ascending step.

    One that was damaged since is among them: passing it over in silence would go back in time.
    """
    store.complete_folders(root, kind=KIND)  # clears what dead writers left
    found = [p for p in Path(root).glob("step-*") if (p / store.MANIFEST_NAME).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def load_newest(root: str | Path) -> tuple[Path, Snapshot] | None:
    """The checkpoint of the highest step under `root`, or None where there is none.

    Raises:
        CheckpointError: it is damaged; the message says what removing it would lead to.
    """
    found = committed(root)
    if not found:
        return None
    try:
        return found[-1], load(found[-1])
    except CheckpointError as error:
        outcome = f"go on from {found[-2].name}" if found[1:] else "start again"
        raise CheckpointError(f"{error}. Remove {found[-1]} to {outcome}") from None


def load(path: str | Path, *, parts: tuple[str, ...] | None = None) -> Snapshot:
    """Read a checkpoint after checking its digests.

    Args:
        parts: which of 'weights', 'ema', 'optimizer', 'frozen' to read; all by default.

    Raises:
        CheckpointError: missing, torn or damaged; the message names the damaged tensor.
    """
    path = Path(path)
    manifest = store.read_manifest(path, kind=KIND, error=CheckpointError)
    wanted = parts or ("weights", "ema", "optimizer", "frozen")
    files = [f"{p}.safetensors" for p in wanted if f"{p}.safetensors" in manifest.files]
    documents = [CONFIG_NAME, PROGRESS_NAME]
    store.open_verified(path, kind=KIND, files=[*files, *documents], error=CheckpointError)
    try:
        tensors = {name.partition(".")[0]: load_file(path / name) for name in files}
        config = (path / CONFIG_NAME).read_text(encoding="utf-8")
        progress = json.loads((path / PROGRESS_NAME).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    weights = tensors.pop("weights", {})
    return Snapshot(manifest.meta["step"], config, weights, progress=progress, **tensors)


def read_config(path: str | Path) -> dict[str, Any]:
    """The resolved config of a checkpoint as a plain tree."""
    store.open_verified(path, kind=KIND, files=[CONFIG_NAME], error=CheckpointError)
    return json.loads((Path(path) / CONFIG_NAME).read_text(encoding="utf-8"))


def part_of_config(schema: type[AnyConfig], tree: Any, folder: Path) -> AnyConfig:
    """A part of a checkpoint's config under today's schema.

    Raises:
        CheckpointError: the checkpoint was written by a version whose configs differ.
    """
    try:
        return validate(schema, tree, where=str(folder / CONFIG_NAME))
    except UsageError as error:
        raise CheckpointError(f"this version of opensora cannot use it: {error}") from None


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors below a module's name, with that name taken off."""
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def inference_weights(snapshot: Snapshot, *, averaged: bool = True) -> Tensors:
    """Weights to use a model with: the averages where they exist, the last weights elsewhere."""
    if not averaged:
        return snapshot.weights
    cast = {
        name: snapshot.ema[name].to(value.dtype) if name in snapshot.ema else value
        for name, value in snapshot.weights.items()
    }
    return cast


def identity(tensors: Tensors) -> str:
    """A digest of weights: 16 hex digits over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
