"""The loop: fetch, compute, agree, update, record, save, stop. It owns time and nothing else.

What a step computes is the task's, how it is placed is the engine's, what is fetched is the plan's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch

from opensora.engine.interface import Engine, Update
from opensora.errors import DataError, Preempted
from opensora.runtime import Runtime, log
from opensora.train import aside
from opensora.train.bar import Bar
from opensora.train.batches import (
    Batches,
    Source,
    close,
    pieces,
    split,
    stand_in,
    tensor_shape,
)
from opensora.train.config import TrainConfig
from opensora.train.exchange import Totals, exchange
from opensora.train.incidents import offenders
from opensora.train.memory import out_of_memory
from opensora.train.meter import Meter, headline
from opensora.train.progress import Progress
from opensora.train.signals import Requests
from opensora.train.state import RunState
from opensora.train.tasks import StepLoss, Sums, Task
from opensora.train.tracking import Tracker
from opensora.train.validation import averaged, measure
from opensora.watchdog import Watchdog

Sampler = Callable[..., dict[str, float] | None]
Evaluator = Callable[..., dict[str, float] | None]

_FINISHING_BATCHES = 8
"""Training batches that stand in for validation batches where a run has none."""


class Trainer:
    """Runs a task to its last step, or to the next checkpoint when asked to stop.

    Args:
        engine: has taken charge of the task already.
        requests: what signals ask for; nothing by default.
        sampler: (task, step, folder, shape, place) draws sample videos into the run's folder.
        evaluator: judges the task as the sampler draws from it, told by `alive` when it gets on;
            returns figures to record.
        matmul_rate: FLOP/s that the devices of all ranks reach together.
        watchdog: is told how far the run is; nobody watches by default.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        runtime: Runtime,
        task: Task,
        engine: Engine,
        source: Source,
        requests: Requests | None = None,
        sampler: Sampler | None = None,
        evaluator: Evaluator | None = None,
        matmul_rate: float = 0.0,
        watchdog: Watchdog | None = None,
    ):
        self.config, self.runtime, self.task = config, runtime, task
        self.engine, self.source, self.sampler = engine, source, sampler
        self.evaluator = evaluator
        self.requests = requests or Requests()
        self.watchdog = watchdog or Watchdog(config.watchdog, runtime.peers, config.output)
        self._shapes: set[tuple[int, ...]] = set()
        self.meter = Meter(matmul_rate, runtime.device)
        self.state = RunState(config, runtime, task, engine, source.identity)
        self.ema, self.guard = self.state.ema, self.state.guard

    @property
    def progress(self) -> Progress:
        return self.state.progress

    def run(self) -> None:
        """Train until done.

        Raises:
            Preempted: after saving, when a signal asked to stop.
            NumericsError: when the guard gives up.
            StorageError: when the last checkpoint cannot be written.
        """
        config, first = self.config, self.progress.step
        if first >= config.steps and self.progress.finished:
            log.info("%s: nothing to do, step %d is done", config.output, first)
            return
        self.tracker = Tracker(config.log, config.output, self.runtime, done=first)
        batches = self.source.train(first)
        visible = config.log.bar and self.runtime.is_main
        try:
            with Bar(
                total=config.steps, first=first, title=config.output.name, visible=visible
            ) as bar:
                self._loop(batches, bar)
            self._finish()
        finally:
            self.tracker.close()
            close(batches)

    def _loop(self, batches: Batches, bar: Bar) -> None:
        self.task.train()
        self._stop_before_the_first_step()
        self.meter.read()
        while self.progress.step < self.config.steps:
            began = time.monotonic()
            self._at("data", long=not self._shapes)
            batch = next(batches, None)
            if batch is None:
                raise DataError(
                    f"the data ended at step {self.progress.step} of {self.config.steps}"
                )
            with out_of_memory(
                batch, config=self.config, task=self.task, runtime=self.runtime,
                step=self.progress.step + 1,
            ):  # fmt: skip
                totals, update = self._step(batch)
            step = self._count(batch, totals, time.monotonic() - began)
            if step % self.config.log.every == 0 or step == self.config.steps:
                self._report(totals, update, bar)
            paused = time.monotonic()
            self._between_steps(totals)
            self.meter.pause(time.monotonic() - paused)

    def _at(self, stage: str, *, long: bool = False) -> None:
        self.watchdog.at(self.progress.step + 1, stage, long=long)

    def _stop_before_the_first_step(self) -> None:
        """A signal may have come while the run was put together; nothing new is to be saved."""
        if any(self.runtime.gather_objects(self.requests.stops > 0)):
            raise Preempted("stopped by a signal before the first step; run the same command again")

    def _step(self, batch: Any) -> tuple[Totals, Update]:
        """One optimizer step: micro-batches, one exchange of sums, a verdict, an update."""
        config, step = self.config, self.progress.step
        parts = split(batch, config.micro_batch)
        outputs, flops = self._backward(parts, stand_in(batch, parts))
        self._at("update")
        totals = exchange(
            outputs,
            self.runtime,
            tokens=sum(self.task.tokens(part) for part in parts),
            replaced=sum(piece.replaced / self.task.sharing(piece) for piece in pieces(batch)),
            flops=flops,
            asked=self.requests.take(),
            unwritten=self.state.pending is not None and not self.state.pending.written,
        )
        self.meter.add(tokens=totals.tokens, flops=totals.flops)
        reasons: list[str | None] = []

        def accept(norm: float) -> bool:
            reasons.append(self.guard.verdict(totals.loss, norm))
            return reasons[0] is None

        update = self.engine.step(
            scale=1 / max(1.0, totals.count),
            max_norm=config.max_grad_norm,
            factor=config.optim.schedule.factor(step, config.steps),
            accept=accept,
        )
        self.task.decided(accepted=update.accepted)
        if update.accepted and self.ema is not None:
            self.ema.update(step)
        if reasons[0] is not None:
            self._write_down(parts, outputs, reasons[0], update)
        self.guard.record(totals.loss, reasons[0], step=step + 1)
        return totals, update

    def _backward(self, parts: list[Any], spare: Any) -> tuple[list[StepLoss], int]:
        """Gradients of every micro-batch; returns what the task told and the FLOPs it took.

        Args:
            spare: what this rank works on, for nothing, while others have more to do.
        """
        outputs, flops, rounds = [], 0, self._rounds(len(parts))
        for number, part in enumerate(parts, 1):
            last = number == rounds
            shape = tensor_shape(part)
            self._at("compute", long=shape not in self._shapes)
            work = partial(self.engine.backward, part, self.progress.step, last=last)
            rehearse = partial(self.task.flops, part) if self.config.compile == "always" else None
            output, cost = self.meter.counted(shape, work, rehearse=rehearse)
            self._shapes.add(shape)
            outputs.append(output)
            flops += cost
        for number in range(len(parts) + 1, rounds + 1):
            last = number == rounds
            output = self.engine.backward(spare, self.progress.step, last=last, weight=0.0)
            outputs = outputs or [output.nothing()]
        return outputs, flops

    def _rounds(self, mine: int) -> int:
        """How often the model is called in a step: at least once, so that all ranks meet where
        gradients are added, and on all ranks equally often where the engine asks for that."""
        even = self.config.micro_batch is None and self.config.data.mix == "steps"
        if not self.engine.collective or even:
            return max(1, mine)
        most = self.runtime.all_reduce(torch.tensor([float(mine)]), "max").item()
        return max(1, int(most))

    def _count(self, batch: Any, totals: Totals, seconds: float) -> int:
        """Note a step that was tried; returns how many there are now."""
        progress = self.progress
        progress.step += 1
        progress.tokens += totals.tokens
        progress.replaced += totals.replaced
        progress.seconds += seconds
        for piece in pieces(batch):
            progress.saw(self.task.shape(piece))
        return progress.step

    def _write_down(
        self, parts: list[Any], outputs: list[StepLoss], reason: str, update: Update
    ) -> None:
        """Tell which samples were in a skipped step, on all ranks."""
        samples, step = offenders(parts, outputs, self.runtime), self.progress.step + 1
        ids = ", ".join(str(sample["id"]) for sample in samples[:4])
        log.warning("step %d skipped: %s; worst samples: %s", step, reason, ids)
        values = {"reason": reason, "gradient_norm": update.gradient_norm, "samples": samples}
        self.tracker.incident(step, values)

    def _report(self, totals: Totals, update: Update, bar: Bar) -> None:
        config, progress, figures = self.config, self.progress, self.meter.read()
        eta = (config.steps - progress.step) / figures["steps_per_second"]
        values = {
            **totals.metrics,
            **figures,
            "gradient_norm": update.gradient_norm,
            "skipped": not update.accepted,
            "lr_factor": config.optim.schedule.factor(progress.step - 1, config.steps),
            "tokens_seen": progress.tokens,
            "train_seconds": progress.seconds,
            "eta_seconds": eta,
            "replaced_samples": progress.replaced,
        }
        self.tracker.record("train", progress.step, values)
        often = max(config.log.every, config.steps // 20)
        shown = progress.step % often < config.log.every or progress.step == config.steps
        line = headline(totals.metrics["loss"], figures)
        bar.update(progress.step, line, eta_seconds=eta, print_line=shown)

    def _between_steps(self, totals: Totals) -> None:
        """Requests from outside, and validation, samples and checkpoints where they are due."""
        config, step = self.config, self.progress.step
        if totals.asked.stop:  # there may be seconds left, so nothing else comes first
            self._at("checkpoint", long=True)
            self.state.save()
            raise Preempted(
                f"stopped by a signal after step {step} of {config.steps}; everything is saved in "
                f"{self.state.root}, run the same command to go on"
            )
        if not totals.unwritten:
            self.state.settle()
        if step == config.steps:
            return
        if _due(step, config.validation.every):
            self.validate()
        if _due(step, config.samples.every):
            self._sample()
        if _due(step, config.evaluation.every):
            self._evaluate()
        if totals.asked.save or _due(step, config.checkpoint.every):
            self._at("checkpoint", long=True)
            if config.checkpoint.background:
                self.state.save_in_background()
            else:
                self.state.save(required=False)

    def validate(self) -> dict[str, float] | None:
        """Metrics of the validation set on the averaged weights, recorded and returned."""
        if not self.source.has_validation:
            return None
        self._at("validation", long=True)
        with averaged(self.task, self.ema):
            values = measure(
                self.source.validation(),
                self._validation,
                self.runtime,
                stand_in=self._any_batch if self.engine.collective else None,
            )
        self.tracker.record("validation", self.progress.step, values)
        shown = ", ".join(f"{k} {v:.4f}" for k, v in values.items() if "/" not in k)
        log.info("step %d validation %s", self.progress.step, shown)
        return values

    def _any_batch(self) -> Any:
        batches = self.source.train(0)
        try:
            batch = next(batches)
            return stand_in(batch, list(pieces(batch)))
        finally:
            close(batches)

    def _validation(self, batch: Any) -> Sums:
        self._at("validation", long=True)
        with self.engine.autocast():
            return self.task.validation(batch)

    def _sample(self) -> None:
        self._aside(self.sampler)

    def _evaluate(self) -> None:
        """Judge the averaged weights as `opensora eval` does, and record what was found."""
        if self.evaluator is None:
            return
        alive = partial(self._at, "samples", long=True)
        values = self._aside(partial(self.evaluator, alive=alive))
        if values:
            self.tracker.record("evaluation", self.progress.step, values)

    def _aside(self, work: Sampler | None) -> dict[str, float] | None:
        """Work on the averaged weights between two steps."""
        if work is None:
            return None
        self._at("samples", long=True)
        step, shape = self.progress.step, self.progress.shape
        do = aside.by_all if self.engine.collective else aside.shared
        with averaged(self.task, self.ema):
            values = do(
                lambda output, place: work(self.task, step, output, shape, place=place),
                self.config.output,
                self.runtime,
            )
        self.runtime.barrier()
        return values

    def _finish(self) -> None:
        """The task's last measurements, the last figures, and the final checkpoint."""
        self._at("validation", long=True)
        has_validation = self.source.has_validation
        batches = self.source.validation() if has_validation else self.source.train(0)
        limit = None if has_validation else _FINISHING_BATCHES
        with averaged(self.task, self.ema):
            self.task.finish(islice(batches, limit), self.runtime)
        close(batches)
        self.validate()
        if self.config.samples.every:
            self._sample()
        if self.config.evaluation.every:
            self._evaluate()
        self.progress.finished = True
        self._at("checkpoint", long=True)
        path = self.state.save()
        if self.runtime.is_main:
            log.info(
                "done: %d steps in %.0f s, %s", self.progress.step, self.progress.seconds, path
            )


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
