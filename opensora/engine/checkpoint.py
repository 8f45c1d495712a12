"""Checkpoints: everything a run needs to go on as if it had not stopped, in one digested folder.

`step-000500/` holds weights, EMA, optimizer and frozen parts as safetensors, whole or in shards,
the trainer's progress and the resolved config as JSON. Nothing is unpickled. The store's manifest
is the commit point. `engine.saving` writes them, on any layout; any other layout reads them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opensora import store
from opensora.config import AnyConfig, validate
from opensora.engine import shards
from opensora.engine.shards import Like, Tensors
from opensora.errors import CheckpointError, UsageError
from opensora.runtime import ALONE, Runtime

KIND = "checkpoint"
CONFIG_NAME = "config.json"
PROGRESS_NAME = "progress.json"
PARTS = ("weights", "ema", "optimizer", "frozen")


@dataclass(frozen=True)
class Snapshot:
    """The state of a run between two steps; tensors are whole, or sharded over ranks (DTensor).

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
    if (path / "model_index.json").is_file():
        state = "is a pipeline of diffusers, which is not read yet"
    runs = sorted(p.parent for p in path.glob("*/checkpoints") if committed(p))
    hint = f" (there are {', '.join(map(str, runs[:5]))})" if runs else ""
    raise CheckpointError(f"{path} {state}: {store.ASK_FOR}{hint}")


def committed(root: str | Path) -> list[Path]:
    """The checkpoints under `root` that were once written whole, by ascending step.

    One that was damaged since is among them: passing it over in silence would go back in time.
    """
    store.complete_folders(root, kind=KIND)  # clears what dead writers left
    found = [p for p in Path(root).glob("step-*") if (p / store.MANIFEST_NAME).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def open_newest(root: str | Path, place: Runtime = ALONE) -> Opened | None:
    """The checkpoint of the highest step under `root`, or None where there is none.

    Collective over the ranks of `place`.

    Raises:
        CheckpointError: it is damaged, and the message says what removing it would lead to; or
            ranks find different ones.
    """
    found = committed(root)
    names = place.gather_objects([path.name for path in found[-1:]])
    if any(name != names[0] for name in names):
        raise CheckpointError(
            f"ranks find different checkpoints in {root}: {names}. All ranks need to see the same "
            "file system"
        )
    if not found:
        return None
    try:
        return Opened(found[-1], place)
    except CheckpointError as error:
        outcome = f"go on from {found[-2].name}" if found[1:] else "start again"
        raise CheckpointError(f"{error}. Remove {found[-1]} to {outcome}") from None


class Opened:
    """A checkpoint whose content has just been verified, to be read from.

    Ranks share the digesting: each verifies some of the files. Collective over `place`.

    Args:
        parts: which of `PARTS` will be read.

    Raises:
        CheckpointError: missing, torn or damaged; the message names the damaged tensor.
    """

    def __init__(self, path: str | Path, place: Runtime = ALONE, parts: Sequence[str] = PARTS):
        self.path = Path(path)
        self.manifest = store.read_manifest(self.path, kind=KIND, error=CheckpointError)
        names = list(self.manifest.files)
        self._files = {part: shards.files_of(part, names) for part in parts}
        files = [CONFIG_NAME, PROGRESS_NAME, *itertools.chain(*self._files.values())]
        self._verify(files, place)
        self.step: int = self.manifest.meta["step"]
        try:
            self.config = (self.path / CONFIG_NAME).read_text(encoding="utf-8")
            progress = (self.path / PROGRESS_NAME).read_text(encoding="utf-8")
            self.progress: dict[str, Any] = json.loads(progress)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from None

    def _verify(self, files: list[str], place: Runtime) -> None:
        problem = ""
        try:
            mine = files[place.rank :: place.world_size]
            store.open_verified(self.path, kind=KIND, files=mine, error=CheckpointError)
        except CheckpointError as error:
            problem = str(error)
        problems = [found for found in place.gather_objects(problem) if found]
        if problems:
            raise CheckpointError(problems[0])

    def read(self, part: str, like: Like | None = None) -> Tensors:
        """The tensors of a part; empty where the checkpoint has none.

        Args:
            like: as in `shards.read`.
        """
        files = [self.path / name for name in self._files[part]]
        return shards.read(files, like) if files else {}


def load(path: str | Path, *, parts: Sequence[str] = PARTS) -> Snapshot:
    """Read a checkpoint into whole tensors, after checking its digests.

    Args:
        parts: which of `PARTS` to read.

    Raises:
        CheckpointError: as `Opened` does.
    """
    found = Opened(path, parts=parts)
    tensors = {part: found.read(part) for part in parts}
    weights = tensors.pop("weights", {})
    return Snapshot(found.step, found.config, weights, progress=found.progress, **tensors)


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
