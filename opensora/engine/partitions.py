"""Averages of weights that ZeRO-3 keeps in flat parts, one on each rank.

Nothing is gathered to average: an average is as flat as the part it follows. DeepSpeed's marks on
parameters (`ds_tensor`, `ds_shape`) are all that is known of it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora.engine.ema import EMA, EMAConfig, check_fits


class _Parts:
    """What `EMA` sees of a module: this rank's part of every parameter, sharing memory."""

    def __init__(self, parameters: dict[str, Any]):
        self._parameters = parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self._parameters.items():
            yield name, nn.Parameter(parameter.ds_tensor.detach())


class PartitionedEMA:
    """`EMA` of a module under ZeRO-3.

    Args:
        release: lets every gathered parameter go, so that the next call gathers the parts anew.
    """

    def __init__(self, module: nn.Module, config: EMAConfig, *, release: Callable[[], None]):
        self.parameters: dict[str, Any] = {
            n: p for n, p in module.named_parameters() if p.requires_grad
        }
        self._parts = EMA(cast(nn.Module, _Parts(self.parameters)), config)
        self._release = release

    def update(self, step: int) -> None:
        """As `EMA.update`."""
        self._parts.update(step)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """As `EMA.swapped`. Collective use of the module is all that may happen inside."""
        self._release()
        try:
            with self._parts.swapped():
                yield
                self._release()
        finally:
            self._release()

    def state_dict(self) -> dict[str, Tensor]:
        """The full averages by name, on every rank. Collective."""
        return {
            name: _whole(average, self.parameters[name].ds_shape)
            for name, average in self._parts.averages.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """As `EMA.load_state_dict`."""
        shapes = {name: p.ds_shape for name, p in self.parameters.items()}
        check_fits(shapes, state)
        for name, average in self._parts.averages.items():
            flat = state[name].flatten()
            mine = flat[dist.get_rank() * len(average) :][: len(average)]
            average.zero_()[: len(mine)].copy_(mine)


def _whole(part: Tensor, shape: torch.Size) -> Tensor:
    """A full tensor from the equal parts of all ranks; the last may be padded."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)[: shape.numel()].view(shape)
