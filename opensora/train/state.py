"""Everything that a run has to remember, and its way into checkpoints and back.

What comes back is equal bit for bit: weights, optimizer, averages, the guard's memory and counts.
The order of data and all randomness need no memory, because they are functions of the step.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from opensora.engine import checkpoint
from opensora.engine.checkpoint import Snapshot
from opensora.engine.ema import EMA
from opensora.engine.interface import Engine
from opensora.errors import StorageError, UsageError
from opensora.runtime import Runtime, log
from opensora.train.config import TrainConfig
from opensora.train.guard import Guard
from opensora.train.progress import Progress
from opensora.train.tasks import Task


class RunState:
    """The state of a run between two steps.

    Args:
        engine: has taken charge of the task already.
        data: identity of the training data.

    Attributes:
        ema: averages of the trained weights, or None.
        root: where the checkpoints are.
    """

    def __init__(
        self, config: TrainConfig, runtime: Runtime, task: Task, engine: Engine, data: str
    ):
        self.config, self.runtime, self.task, self.engine = config, runtime, task, engine
        self.ema = EMA(task, config.ema) if config.ema is not None else None
        self.guard = Guard(config.guard)
        self.progress = Progress()
        self.root = config.output / "checkpoints"
        self._data = data

    @cached_property
    def _ingredients(self) -> dict[str, str]:
        """Digests of what a run is made of besides its config, by the key that leads to it."""
        return {"data": self._data, "task.vae_from": checkpoint.identity(self.task.frozen())}

    def resume(self) -> bool:
        """Take up the newest checkpoint of this run, if there is one.

        Raises:
            CheckpointError: it is damaged.
            UsageError: another config, other data or other frozen weights wrote it.
        """
        newest = checkpoint.load_newest(self.root)
        if newest is None:
            return False
        path, snapshot = newest
        self._check_ingredients(path, snapshot)
        self.engine.load_state_dict({"weights": snapshot.weights, "optimizer": snapshot.optimizer})
        if self.ema is not None:
            self.ema.load_state_dict(snapshot.ema)
        self.guard.restore(snapshot.progress["guard"])
        self.progress = Progress.restored(snapshot.progress)
        log.info("resumed %s at step %d of %d", path, self.progress.step, self.config.steps)
        return True

    def _check_ingredients(self, path: Path, snapshot: Snapshot) -> None:
        self.config.check_resumable(snapshot.config, str(path))
        for key, found in self._ingredients.items():
            same = snapshot.progress["ingredients"][key] == found
            if not same and not self.config.accepts_change_of(key):
                raise UsageError(
                    f"{path} was trained with another content of {key}: use a new output= for the "
                    "changed run, bring the old content back, or accept the change with "
                    f"resume_despite=[{key}]"
                )

    def save(self, *, required: bool = True) -> Path | None:
        """Commit a checkpoint; every rank waits until it stands.

        Args:
            required: otherwise a disk that refuses is told of, and the run goes on as long as an
                earlier checkpoint stands.

        Returns:
            Where it is, or None where the disk refused.

        Raises:
            StorageError: on every rank, when a checkpoint that must be is not.
        """
        path, problem = None, ""
        snapshot = self._snapshot()
        if self.runtime.is_main:
            try:
                path = checkpoint.save(self.root, snapshot, keep=self.config.checkpoint.keep)
            except StorageError as error:
                problem = str(error)
                required = required or not checkpoint.committed(self.root)
        path, problem, required = self.runtime.gather_objects((path, problem, required))[0]
        if problem and required:
            raise StorageError(problem)
        if problem:
            log.error("%s. Training goes on; %s has what is saved", problem, self.root)
        return path

    def _snapshot(self) -> Snapshot:
        """On rank 0; the others help to gather it."""
        state = self.engine.state_dict()
        return Snapshot(
            step=self.progress.step,
            config=self.config.json_text(),
            weights=state["weights"],
            optimizer=state["optimizer"],
            ema=self.ema.state_dict() if self.ema is not None else {},
            frozen=self.task.frozen(),
            progress={
                **self.progress.state(),
                "guard": self.guard.state(),
                "ingredients": self._ingredients,
            },
        )
