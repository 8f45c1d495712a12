"""What is written down about a step that did not reach the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from opensora.runtime import Runtime
from opensora.train.tasks import StepLoss


def offenders(
    parts: Sequence[Any], outputs: Sequence[StepLoss], runtime: Runtime
) -> list[dict[str, Any]]:
    """The samples of a step on all ranks, the worst first.

    Args:
        parts: this rank's micro-batches.
        outputs: what the task gave for each.

    Returns:
        {'id', 'loss', 'text'} of each; a loss that is not a number counts as the worst.
    """
    mine = [
        {"id": number, "loss": loss, "text": text}
        for part, output in zip(parts, outputs, strict=False)  # one without parts has an output
        for number, loss, text in zip(
            part.sample_ids.tolist(), output.per_sample.tolist(), part.texts, strict=True
        )
    ]
    everyone = [sample for part in runtime.gather_objects(mine) for sample in part]
    return sorted(everyone, key=lambda sample: _badness(sample["loss"]), reverse=True)


def _badness(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
