"""Flow matching on the straight line from data to noise (rectified flow).

    x_t = (1 - t) data + t noise        velocity = noise - data

The line ends in the data itself: Lipman's sigma_min is 0, so that a frame given at t = 0 is
exactly the frame. Conversions and losses are those of every process, in `process`.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from opensora.diffusion.process import Curve, Process, ProcessConfig


class FlowConfig(ProcessConfig):
    """Rectified flow: a straight line at constant velocity."""

    kind: Literal["flow"] = "flow"


@final
class Flow(Process):
    """The straight line (Liu et al. 2023, "Flow Straight and Fast"; Lipman et al. 2023).

    `FlowConfig(prediction="data", loss_space="velocity")` is JiT (Li and He 2025): the squared
    error of the data over max(t, min_divisor)^2.
    """

    def __init__(self, config: FlowConfig | None = None) -> None:
        super().__init__(config or FlowConfig())

    def curve(self, t: Tensor) -> Curve:
        one = torch.ones_like(t)
        return Curve(alpha=one - t, sigma=t, alpha_rate=-one, sigma_rate=one)
