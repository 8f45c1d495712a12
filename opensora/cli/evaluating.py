"""Suites of `opensora eval` inside a training run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from opensora import config as configs
from opensora.cli.judging import SUITES
from opensora.cli.sampling import pipeline_of
from opensora.config import Config
from opensora.errors import UsageError, did_you_mean
from opensora.evaluate.suite import Subject, groups
from opensora.runtime import Runtime
from opensora.train.config import EvaluationConfig, TrainConfig
from opensora.train.tasks import Task
from opensora.train.trainer import Evaluator


def check(wanted: EvaluationConfig) -> Config:
    """The settings of the suite that a run asks for.

    Raises:
        UsageError: there is no such suite, or no such setting.
    """
    if wanted.suite not in SUITES:
        hint = did_you_mean(wanted.suite, SUITES)
        raise UsageError(f"evaluation.suite={wanted.suite} is unknown.{hint}")
    schema = SUITES[wanted.suite].config
    return configs.validate(schema, wanted.settings, where="evaluation.settings")


def evaluator_for(config: TrainConfig) -> Evaluator:
    """The function that judges a text-to-video task in training.

    It writes to `evaluation/step-N` of the run, and returns `group/metric` -> mean; ranks that
    write no scores may return {}.
    """
    settings, suite = check(config.evaluation), SUITES[config.evaluation.suite]

    def evaluate(
        task: Task,
        step: int,
        folder: Path,
        shape: dict[str, Any],
        *,
        place: Runtime,
        alive: Callable[[], None],
    ) -> dict[str, float]:
        subject = Subject(pipeline_of(task, step, shape), place=place)
        output = folder / "evaluation" / f"step-{step:06d}"
        results = suite.run(subject, settings, output, lambda *progress: alive())
        return {
            f"{group}/{metric}": estimate["mean"]
            for group, metrics in groups(results).items()
            for metric, estimate in metrics.items()
        }

    return evaluate
