"""How fast a run is: steps, tokens and FLOPs a second, against the machine's matmul rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from opensora.engine.flops import FlopCounter
from opensora.train.tracking import peak_memory_bytes

Output = TypeVar("Output")


@dataclass
class Meter:
    """Counts work since the last reading; time spent on validation and saving is left out.

    FLOPs are those of matrix products, convolutions and attention, forward and backward, counted
    once for each shape of batch.

    Attributes:
        matmul_rate: FLOP/s that this job's devices reach on plain matrix products.
    """

    matmul_rate: float
    device: torch.device
    steps: int = 0
    tokens: float = 0.0
    flops: float = 0.0
    _began: float = field(default_factory=time.monotonic)
    _paused: float = 0.0
    _known: dict[tuple[int, ...], int] = field(default_factory=dict)

    def counted(
        self,
        shape: tuple[int, ...],
        work: Callable[[], Output],
        *,
        rehearse: Callable[[], int | None] | None = None,
    ) -> tuple[Output, int]:
        """Do the work of a micro-batch of some shape; returns its FLOPs beside its output.

        Args:
            rehearse: counts without doing the work, where it cannot be watched (compiled code).
                What it does not know is counted in the work.
        """
        if shape not in self._known and rehearse is not None and (cost := rehearse()) is not None:
            self._known[shape] = cost
        if shape in self._known:
            return work(), self._known[shape]
        with FlopCounter() as counter:
            output = work()
        self._known[shape] = counter.total
        return output, self._known[shape]

    def add(self, *, tokens: float, flops: float) -> None:
        """Note a finished step."""
        self.steps += 1
        self.tokens += tokens
        self.flops += flops

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on steps."""
        self._paused += seconds

    def read(self) -> dict[str, Any]:
        """The figures since the last reading, which begin anew."""
        elapsed = max(1e-9, time.monotonic() - self._began - self._paused)
        flops = self.flops / elapsed
        figures = {
            "steps_per_second": self.steps / elapsed,
            "tokens_per_second": self.tokens / elapsed,
            "flops_per_second": flops,
            "matmul_share": flops / self.matmul_rate if self.matmul_rate else 0.0,
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        self.steps, self.tokens, self.flops = 0, 0.0, 0.0
        self._began, self._paused = time.monotonic(), 0.0
        return figures


def headline(loss: float, figures: dict[str, Any]) -> str:
    """The figures of the live bar."""
    tokens = figures["tokens_per_second"]
    shown = f"{tokens / 1000:.1f}k" if tokens >= 1000 else f"{tokens:.0f}"
    memory = figures["peak_memory_bytes"] / 2**30
    return (
        f"loss {loss:.4f} {figures['steps_per_second']:.2f} it/s {shown} tok/s "
        f"{figures['matmul_share']:.0%} of matmul {memory:.1f} GiB"
    )
