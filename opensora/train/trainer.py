"""The loop: fetch, compute, agree, update, record, save, stop. It owns time and nothing else.

What a step computes is the task's, how it is placed is the engine's, what is fetched is the plan's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from opensora.engine import checkpoint
from opensora.engine.ema import EMA
from opensora.engine.local import LocalEngine, Update
from opensora.errors import DataError, Preempted, UsageError
from opensora.runtime import Runtime, log
from opensora.train.config import TrainConfig
from opensora.train.guard import Guard
from opensora.train.meter import Meter, headline
from opensora.train.signals import Requests, listening
from opensora.train.tasks import StepLoss, Sums, Task
from opensora.train.tracking import Bar, Tracker

Batches = Iterator[Any]
Sampler = Callable[[Task, int, Path, dict[str, Any]], None]


class Source(Protocol):
    """Where batches come from."""

    @property
    def has_validation(self) -> bool: ...

    @property
    def identity(self) -> str:
        """Digest of everything that decides which samples a step sees."""
        ...

    def train(self, first_step: int) -> Batches:
        """This rank's batches from a step on, without end."""
        ...

    def validation(self) -> Batches:
        """One pass over this rank's validation batches, the same every time."""
        ...


@dataclass
class Totals:
    """Sums over the ranks of one step."""

    loss: float
    count: float
    tokens: float
    replaced: float
    metrics: dict[str, float]


class Trainer:
    """Runs a task to its last step, or to the next checkpoint when asked to stop."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        runtime: Runtime,
        task: Task,
        engine: LocalEngine,
        source: Source,
        sampler: Sampler | None = None,
        matmul_rate: float = 0.0,
    ):
        self.config, self.runtime, self.task = config, runtime, task
        self.engine, self.source, self.sampler = engine, source, sampler
        self.meter = Meter(matmul_rate, runtime.device)
        self.guard = Guard(config.guard)
        self.ema = EMA(task, config.ema) if config.ema is not None else None
        self.root = config.output / "checkpoints"
        self.step = 0
        self.tokens_seen = 0.0
        self.seconds = 0.0
        self.shape: dict[str, Any] = {}

    def resume(self) -> bool:
        """Take up the newest complete checkpoint of this run, if there is one."""
        newest = checkpoint.store.latest(self.root, kind=checkpoint.KIND)
        if newest is None:
            return False
        snapshot = checkpoint.load(newest)
        self.config.check_resumable(snapshot.config, str(newest))
        self.engine.load_state_dict({"weights": snapshot.weights, "optimizer": snapshot.optimizer})
        if self.ema is not None:
            self.ema.load_state_dict(snapshot.ema)
        progress = snapshot.progress
        for what, found in self._ingredients().items():
            if progress["ingredients"][what] != found:
                raise UsageError(
                    f"{newest} was trained with other {what} than this run would use; use a new "
                    f"output= for the changed run, or restore the {what} to resume"
                )
        self.step = snapshot.step
        self.guard.restore(progress["guard"])
        self.tokens_seen, self.seconds = progress["tokens"], progress["seconds"]
        self.shape = progress["shape"]
        log.info("resumed %s at step %d of %d", newest, self.step, self.config.steps)
        return True

    def _ingredients(self) -> dict[str, str]:
        """Digests of what a run is made of besides its config."""
        return {
            "data": self.source.identity,
            "frozen weights": checkpoint.identity(self.task.frozen()),
        }

    def save(self) -> Path | None:
        """Commit a checkpoint; every rank waits until it stands."""
        path = None
        if self.runtime.is_main:
            state = self.engine.state_dict()
            snapshot = checkpoint.Snapshot(
                step=self.step,
                config=self.config.json_text(),
                weights=state["weights"],
                optimizer=state["optimizer"],
                ema=self.ema.state_dict() if self.ema is not None else {},
                frozen=self.task.frozen(),
                progress={
                    "guard": self.guard.state(),
                    "tokens": self.tokens_seen,
                    "seconds": self.seconds,
                    "shape": self.shape,
                    "ingredients": self._ingredients(),
                },
            )
            path = checkpoint.save(self.root, snapshot, keep=self.config.checkpoint.keep)
        self.runtime.barrier()
        return path

    def run(self) -> None:
        """Train until done.

        Raises:
            Preempted: after saving, when a signal asked to stop.
            NumericsError: when the guard gives up.
        """
        config = self.config
        if self.step >= config.steps:
            log.info("%s: nothing to do, step %d is done", config.output, self.step)
            return
        first = self.step
        self.tracker = Tracker(config.log, config.output, self.runtime, first_step=first)
        batches = self.source.train(first)
        title = config.output.name
        visible = config.log.bar and self.runtime.is_main
        try:
            with (
                listening() as requests,
                Bar(total=config.steps, first=first, title=title, visible=visible) as bar,
            ):
                self._loop(batches, requests, bar)
        finally:
            self.tracker.close()
            close = getattr(batches, "close", None)
            if close is not None:
                close()

    def _loop(self, batches: Batches, requests: Requests, bar: Bar) -> None:
        config = self.config
        self.task.train()
        self.meter.read()
        while self.step < config.steps:
            began = time.monotonic()
            batch = next(batches, None)
            if batch is None:
                raise DataError(f"the data ended at step {self.step} of {config.steps}")
            totals, update = self._step(batch)
            self.step += 1
            self.tokens_seen += totals.tokens
            paused = time.monotonic()
            self.seconds += paused - began
            if self.step % config.log.every == 0 or self.step == config.steps:
                self._report(totals, update, bar)
                paused = time.monotonic()
            self._between_steps(requests)
            self.meter.pause(time.monotonic() - paused)
        self._finish()

    def _between_steps(self, requests: Requests) -> None:
        """Validation, samples and checkpoints where they are due, and requests from outside."""
        config, asked = self.config, requests.agreed(self.runtime)
        if self.step == config.steps:
            return
        if _due(self.step, config.validation.every):
            self.validate()
        if _due(self.step, config.samples.every) and self.sampler is not None:
            self._sample()
        if asked.stop or asked.save or _due(self.step, config.checkpoint.every):
            self.save()
        if asked.stop:
            raise Preempted(
                f"stopped by a signal after step {self.step} of {config.steps}; everything is "
                f"saved in {self.root}, run the same command to go on"
            )

    def _step(self, batch: Any) -> tuple[Totals, Update]:
        """One optimizer step: micro-batches, one exchange of sums, a verdict, an update."""
        config = self.config
        parts = split(batch, config.micro_batch)
        outputs: list[StepLoss] = []
        flops = 0
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            work = partial(self.engine.backward, part, self.step, last=last)
            output, cost = self.meter.counted(_shape(part), work)
            outputs.append(output)
            flops += cost
        tokens = sum(self.task.tokens(part) for part in parts)
        self.shape = max(self.shape, self.task.shape(batch), key=_pixels)
        totals = self._totals(outputs, tokens, getattr(batch, "replaced", 0))
        self.meter.add(tokens=totals.tokens, flops=flops * self.runtime.world_size)
        loss = totals.loss / max(1.0, totals.count)
        reason: list[str | None] = [None]

        def accept(norm: float) -> bool:
            reason[0] = self.guard.verdict(loss, norm)
            return reason[0] is None

        factor = config.optim.schedule.factor(self.step, config.steps)
        update = self.engine.step(
            scale=1 / max(1.0, totals.count),
            max_norm=config.max_grad_norm,
            factor=factor,
            accept=accept,
        )
        if update.accepted and self.ema is not None:
            self.ema.update(self.step)
        if reason[0] is not None:
            self._name_offenders(batch, outputs, reason[0], update)
        self.guard.record(loss, reason[0], step=self.step)
        return totals, update

    def _totals(self, outputs: list[StepLoss], tokens: int, replaced: int) -> Totals:
        names = sorted(outputs[0].metrics)
        rows = [
            (sum(float(o.total.detach()) for o in outputs), sum(float(o.count) for o in outputs))
        ]
        for name in names:
            pairs = [o.metrics[name] for o in outputs]
            rows.append((sum(float(p[0]) for p in pairs), sum(float(p[1]) for p in pairs)))
        rows.append((float(tokens), float(replaced)))
        sums = self.runtime.all_reduce(torch.tensor(rows, dtype=torch.float64)).tolist()
        metrics = {n: s / max(1e-12, c) for n, (s, c) in zip(names, sums[1:-1], strict=True)}
        return Totals(sums[0][0], sums[0][1], sums[-1][0], sums[-1][1], metrics)

    def _name_offenders(
        self, batch: Any, outputs: list[StepLoss], reason: str, update: Update
    ) -> None:
        """Tell which samples were in a skipped step, worst first, on all ranks."""
        losses = torch.cat([o.per_sample for o in outputs]).tolist()
        rows = sorted(
            zip(losses, batch.sample_ids.tolist(), batch.texts, strict=True),
            key=lambda row: row[0] if row[0] == row[0] else float("inf"),
            reverse=True,
        )
        samples = [{"id": i, "loss": str(value), "text": text} for value, i, text in rows]
        gathered = self.runtime.gather_objects(samples)
        everyone = [sample for part in gathered for sample in part]
        ids = ", ".join(str(s["id"]) for s in everyone[:4])
        log.warning("step %d skipped: %s; worst samples: %s", self.step, reason, ids)
        self.tracker.incident(
            {
                "step": self.step,
                "reason": reason,
                "gradient_norm": update.gradient_norm,
                "samples": everyone,
            }
        )

    def _report(self, totals: Totals, update: Update, bar: Bar) -> None:
        config, figures = self.config, self.meter.read()
        eta = (config.steps - self.step) / figures["steps_per_second"]
        values = {
            **totals.metrics,
            **figures,
            "gradient_norm": update.gradient_norm,
            "skipped": not update.accepted,
            "lr_factor": config.optim.schedule.factor(self.step - 1, config.steps),
            "tokens_seen": self.tokens_seen,
            "train_seconds": self.seconds,
            "eta_seconds": eta,
            "replaced_samples": totals.replaced,
        }
        self.tracker.record("train", self.step, values)
        often = max(config.log.every, config.steps // 20)
        shown = self.step % often < config.log.every or self.step == config.steps
        line = headline(totals.metrics["loss"], figures)
        bar.update(self.step, line, eta_seconds=eta, print_line=shown)

    def validate(self) -> dict[str, float] | None:
        """Metrics of the validation set on the averaged weights, recorded and returned."""
        if not self.source.has_validation:
            return None
        sums: dict[str, tuple[float, float]] = {}
        self.task.eval()
        with self.averaged():
            for batch in self.source.validation():
                for name, (total, count) in self._validation(batch).items():
                    before = sums.get(name, (0.0, 0.0))
                    sums[name] = (before[0] + float(total), before[1] + float(count))
        self.task.train()
        names = sorted(sums)
        table = torch.tensor([sums[n] for n in names], dtype=torch.float64)
        reduced = self.runtime.all_reduce(table).tolist()
        values = {
            n: total / max(1e-12, count) for n, (total, count) in zip(names, reduced, strict=True)
        }
        self.tracker.record("validation", self.step, values)
        log.info("step %d validation %s", self.step, _headline(values))
        return values

    def _validation(self, batch: Any) -> Sums:
        with self.engine.autocast():
            return self.task.validation(batch)

    def _sample(self) -> None:
        assert self.sampler is not None
        self.task.eval()
        with self.averaged():
            if self.runtime.is_main:
                self.sampler(self.task, self.step, self.config.output, self.shape)
        self.runtime.barrier()
        self.task.train()

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the task carries its averaged weights, where such are kept."""
        return self.ema.swapped() if self.ema is not None else nullcontext()

    def _finish(self) -> None:
        """The task's last measurements, the last figures, and the final checkpoint."""
        if self.source.has_validation:
            self.task.eval()
            with self.averaged():
                self.task.finish(self.source.validation())
            self.validate()
            if self.config.samples.every and self.sampler is not None:
                self._sample()
        path = self.save()
        if self.runtime.is_main:
            log.info("done: %d steps in %.0f s, %s", self.step, self.seconds, path)


def split(batch: Any, micro_batch: int | None) -> list[Any]:
    """A batch in pieces of at most `micro_batch` samples."""
    size = len(batch)
    if micro_batch is None or micro_batch >= size:
        return [batch]
    return [batch[start : start + micro_batch] for start in range(0, size, micro_batch)]


def _shape(batch: Any) -> tuple:
    values = getattr(batch, "latents", None)
    return tuple((values if values is not None else batch.pixels).shape)


def _pixels(shape: dict[str, Any]) -> int:
    return shape["num_frames"] * shape["height"] * shape["width"] if shape else 0


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _headline(values: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.4f}" for k, v in values.items() if "/" not in k)
