"""What is written down about a step that did not reach the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from opensora.runtime import Runtime
from opensora.train.tasks import StepLoss


def offenders(batch: Any, outputs: Sequence[StepLoss], runtime: Runtime) -> list[dict[str, Any]]:
    """The samples of a step on all ranks, the worst first.

    Returns:
        {'id', 'loss', 'text'} of each; a loss that is not a number counts as the worst.
    """
    losses = torch.cat([output.per_sample for output in outputs]).tolist()
    rows = zip(batch.sample_ids.tolist(), losses, batch.texts, strict=True)
    mine = [{"id": number, "loss": loss, "text": text} for number, loss, text in rows]
    everyone = [sample for part in runtime.gather_objects(mine) for sample in part]
    return sorted(everyone, key=lambda sample: _badness(sample["loss"]), reverse=True)


def _badness(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
