"""The one exchange of numbers before an update: sums over micro-batches and ranks.

What outsiders asked of any rank (stop, save) travels in the same message, so the ranks agree on
it without another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.runtime import Runtime
from opensora.train.signals import Asked
from opensora.train.tasks import StepLoss

Number = float | Tensor


@dataclass(frozen=True)
class Totals:
    """A step over all micro-batches and ranks; the same on every rank.

    Attributes:
        loss: mean over the units that count.
        count: how many units those are.
        tokens: that the model saw.
        replaced: samples that stood in for unreadable ones.
        flops: of forward and backward.
        metrics: means by name.
        asked: what any rank was asked for.
        unwritten: ranks that still write a checkpoint.
    """

    loss: float
    count: float
    tokens: float
    replaced: float
    flops: float
    metrics: dict[str, float]
    asked: Asked
    unwritten: float = 0.0


def exchange(
    outputs: Sequence[StepLoss],
    runtime: Runtime,
    *,
    tokens: int,
    replaced: float,
    flops: float,
    asked: Asked,
    unwritten: bool = False,
) -> Totals:
    """Add up the outputs of this rank's micro-batches and those of the other ranks.

    All sums leave the device in one copy.
    """
    names = sorted(outputs[0].metrics)
    pairs = [pair for o in outputs for pair in ((o.total, o.count), *(o.metrics[n] for n in names))]
    flat = torch.stack([value.detach().float() for pair in pairs for value in pair])
    sums = flat.cpu().double().view(len(outputs), -1, 2).sum(0)  # rows 2
    counts = [[tokens, replaced], [asked.stop, asked.save], [flops, unwritten]]
    extra = torch.tensor(counts, dtype=torch.float64)
    table = runtime.all_reduce(torch.cat([sums, extra])).tolist()
    (loss, count), *metrics, (tokens_, replaced_), (stop, save), (flops_, unwritten_) = table
    return Totals(
        loss=loss / max(1.0, count),
        count=count,
        tokens=tokens_,
        replaced=replaced_,
        flops=flops_,
        metrics={name: mean(*pair) for name, pair in zip(names, metrics, strict=True)},
        asked=Asked(stop > 0, save > 0),
        unwritten=unwritten_,
    )


def means(sums: Mapping[str, tuple[Number, Number]], runtime: Runtime) -> dict[str, float]:
    """name -> mean over all ranks, from each rank's name -> (sum, count).

    A rank may lack names, as one that had nothing to measure does.
    """
    names = sorted({name for found in runtime.gather_objects(list(sums)) for name in found})
    rows = [[float(value) for value in sums.get(name, (0.0, 0.0))] for name in names]
    table = runtime.all_reduce(torch.tensor(rows, dtype=torch.float64).view(-1, 2)).tolist()
    return {name: mean(*pair) for name, pair in zip(names, table, strict=True)}


def mean(total: float, count: float) -> float:
    """total / count, and 0 where nothing was counted."""
    return total / count if count else 0.0
