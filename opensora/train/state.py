"""Everything that a run has to remember, and its way into checkpoints and back.

What comes back is equal bit for bit: weights, optimizer, averages, the guard's memory and counts.
The order of data and all randomness need no memory, because they are functions of the step.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from opensora.engine import checkpoint, interface
from opensora.engine.checkpoint import Opened, Snapshot
from opensora.engine.interface import Engine
from opensora.engine.saving import Saving
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
        pending: the checkpoint that is being written while training goes on.
    """

    def __init__(
        self, config: TrainConfig, runtime: Runtime, task: Task, engine: Engine, data: str
    ):
        self.config, self.runtime, self.task, self.engine = config, runtime, task, engine
        self.ema = engine.averages(config.ema) if config.ema is not None else None
        self.guard = Guard(config.guard)
        self.progress = Progress()
        self.pending: Saving | None = None
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
        found = checkpoint.open_newest(self.root, self.runtime)
        if found is None:
            return False
        self._check_ingredients(found)
        like = interface.like(self.task)
        parts = ("weights", "optimizer")
        self.engine.load_state_dict({part: found.read(part, like) for part in parts})
        if self.ema is not None:
            self.ema.load_state_dict(found.read("ema", like))
        self.guard.restore(found.progress["guard"])
        self.progress = Progress.restored(found.progress)
        log.info("resumed %s at step %d of %d", found.path, self.progress.step, self.config.steps)
        return True

    def _check_ingredients(self, found: Opened) -> None:
        self.config.check_resumable(found.config, str(found.path))
        for key, content in self._ingredients.items():
            same = found.progress["ingredients"][key] == content
            if not same and not self.config.accepts_change_of(key):
                raise UsageError(
                    f"{found.path} was trained with another content of {key}: use a new output= "
                    "for the changed run, bring the old content back, or accept the change with "
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
        self.settle()
        return self._finish(self._begin(background=False), required=required)

    def save_in_background(self) -> None:
        """Begin a checkpoint that `settle` commits; an earlier one is settled first."""
        self.settle()
        self.pending = self._begin(background=True)

    def settle(self) -> None:
        """Commit the checkpoint that is being written, if there is one. Collective.

        Raises:
            StorageError: on every rank, when it failed and no earlier one stands.
        """
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self._finish(pending, required=False)

    def _begin(self, *, background: bool) -> Saving:
        keep = self.config.checkpoint.keep
        return Saving(
            self.root, self._snapshot(), keep=keep, place=self.runtime, background=background
        )

    def _finish(self, saving: Saving, *, required: bool) -> Path | None:
        try:
            path = saving.finish()
        except StorageError as error:
            stands = self.runtime.gather_objects(bool(checkpoint.committed(self.root)))[0]
            if required or not stands:
                raise
            log.error("%s. Training goes on; %s has what is saved", error, self.root)
            return None
        log.info("saved %s; training waited %.1f s", path.name, saving.seconds)
        return path

    def _snapshot(self) -> Snapshot:
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
