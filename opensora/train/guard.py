"""The verdict before every update: go on, skip this batch, or give up.

It sees only numbers that all ranks share, so all ranks decide alike without another exchange.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from opensora.config import Config
from opensora.errors import NumericsError


class GuardConfig(Config):
    """What counts as a step that must not reach the weights."""

    spike_sigmas: float = Field(
        default=6.0,
        gt=0,
        description="a loss this many deviations above the recent mean, and twice it, is a spike",
    )
    window: int = Field(
        default=128, ge=8, description="accepted losses that the mean is taken over"
    )
    patience: int = Field(default=5, ge=1, description="skipped steps in a row that end the run")


@dataclass
class Guard:
    """Judges losses and gradient norms; its memory is part of the checkpoint."""

    config: GuardConfig
    recent: deque[float] = field(default_factory=deque)
    skipped_in_a_row: int = 0

    def verdict(self, loss: float, gradient_norm: float) -> str | None:
        """None to go on, or why this step is skipped.

        Half a window must be known for a spike. Where losses hardly differ, deviations say
        nothing, so a spike is also at least twice the mean.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"the gradient norm is {gradient_norm}"
        if len(self.recent) >= self.config.window // 2:
            mean = sum(self.recent) / len(self.recent)
            variance = sum((x - mean) ** 2 for x in self.recent) / len(self.recent)
            limit = mean + max(abs(mean), self.config.spike_sigmas * math.sqrt(variance))
            if loss > limit:
                return f"the loss {loss:.4g} is above {limit:.4g}, a spike"
        return None

    def record(self, loss: float, reason: str | None, *, step: int) -> None:
        """Remember the outcome of step number `step`, counted from 1.

        Raises:
            NumericsError: after `patience` skipped steps in a row.
        """
        if reason is None:
            self.skipped_in_a_row = 0
            self.recent.append(loss)
            while len(self.recent) > self.config.window:
                self.recent.popleft()
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.config.patience:
            raise NumericsError(
                f"step {step}: {self.skipped_in_a_row} steps in a row were skipped, the last "
                f"because {reason}. incidents.jsonl names the samples. Go on from the last "
                "checkpoint with a lower rate (optim.lr=... resume_despite=[optim]), or without "
                "them (resume_despite=[data])"
            )

    def state(self) -> dict[str, Any]:
        return {"recent": list(self.recent), "skipped_in_a_row": self.skipped_in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        self.recent = deque(state["recent"])
        self.skipped_in_a_row = state["skipped_in_a_row"]
