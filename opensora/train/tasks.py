"""What one step computes: the contract between the trainer, which owns time, and a task.

A task is a module whose children are trained and whose forward is the loss of a micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from opensora.engine.deferred import Recipe
from opensora.runtime import Runtime

Sums = dict[str, tuple[Tensor, Tensor]]
"""name -> (sum, count), detached scalars, so that parts simply add."""


@dataclass(frozen=True)
class StepLoss:
    """The loss of a micro-batch, as sums, so that ranks and micro-batches simply add.

    Attributes:
        total: scalar to differentiate: the sum of the loss over the units that count.
        count: scalar, how many units that is.
        per_sample: (B,) detached mean loss of each sample, to name offenders.
        metrics: name -> (sum, count); at a step the names are the same on every rank.
    """

    total: Tensor
    count: Tensor
    per_sample: Tensor
    metrics: Sums = field(default_factory=dict)

    def nothing(self) -> StepLoss:
        """The loss of no samples, with the same metrics."""
        zero = torch.zeros(())
        none = dict.fromkeys(self.metrics, (zero, zero))
        return StepLoss(zero, zero, torch.zeros(0), none)


class Task(nn.Module, ABC):
    """A trainable whole: what it holds as child modules is optimised, averaged and saved.

    Attributes:
        recipe: how the engine fills a model that was built without weights, or None.
    """

    recipe: Recipe | None = None

    @abstractmethod
    def forward(self, batch: Any, step: int) -> StepLoss:
        """The loss of a micro-batch at a step (0-based); randomness is addressed by sample id.

        Leaves no trace beside gradients: whether the step is made is decided after it.
        """

    @abstractmethod
    def validation(self, batch: Any) -> Sums:
        """Metrics of a validation batch with fixed noise, as name -> (sum, count)."""

    @abstractmethod
    def tokens(self, batch: Any) -> int:
        """How many tokens the model sees for a batch on this rank, for throughput."""

    def sharing(self, batch: Any) -> int:
        """How many ranks work on the same samples."""
        return 1

    @abstractmethod
    def shape(self, batch: Any) -> dict[str, Any]:
        """Pixel num_frames, height, width and fps of a batch's clips."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated parts of the model, which may be compiled; none by default."""
        return ()

    def flops(self, batch: Any) -> int | None:
        """FLOPs of a step on a micro-batch, forward and backward, counted without doing it; None
        where they can only be counted while it works. Tasks with `blocks` know them."""
        return None

    def frozen(self) -> dict[str, Tensor]:
        """Weights that are needed to use the result but are not trained; saved beside it."""
        return {}

    def decided(self, *, accepted: bool) -> None:
        """Called after every step: whether its gradients reached the weights."""

    def finish(self, batches: Iterable[Any], runtime: Runtime) -> None:
        """Called on every rank after the last step, with its share of the validation batches (or
        of some training batches where there are none), before the final save."""
