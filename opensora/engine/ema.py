"""Exponential moving averages of weights, with a fixed or a power-law memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from opensora.config import Config
from opensora.dist.sharded import local, placed
from opensora.errors import CheckpointError


class FixedEMAConfig(Config):
    """A fixed decay, reached after a warm-up so that the start is forgotten."""

    kind: Literal["fixed"] = "fixed"
    decay: float = Field(default=0.999, ge=0, lt=1)

    def decay_at(self, step: int) -> float:
        """Decay of update number `step` (0-based)."""
        return min(self.decay, (1 + step) / (10 + step))


class PowerEMAConfig(Config):
    """A memory that grows with the run: decay (1 - 1/n)^(gamma + 1) at update n = 1, 2, ...

    Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
    equation 127; gamma 6.94 is a relative width of 10 % of the run, 16.97 of 5 %.
    """

    kind: Literal["power"] = "power"
    gamma: float = Field(default=16.97, gt=0)

    def decay_at(self, step: int) -> float:
        """Decay of update number `step` (0-based)."""
        return (1 - 1 / (step + 1)) ** (self.gamma + 1)


EMAConfig = Annotated[FixedEMAConfig | PowerEMAConfig, Field(discriminator="kind")]


class Averages(Protocol):
    """What the trainer knows of averages, wherever an engine keeps them; see `EMA`."""

    def update(self, step: int) -> None: ...
    def swapped(self) -> AbstractContextManager[None]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class EMA:
    """Averages of a module's trained parameters, in float32."""

    def __init__(self, module: nn.Module, config: FixedEMAConfig | PowerEMAConfig):
        self.config = config
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.averages = {n: p.detach().float().clone() for n, p in self.parameters.items()}
        # The parts at hand: averaging needs no other rank.
        self._parts = [local(a) for a in self.averages.values()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights after update number `step`."""
        weights = [local(p.detach()).float() for p in self.parameters.values()]
        torch._foreach_lerp_(self._parts, weights, 1 - self.config.decay_at(step))

    @contextmanager
    @torch.no_grad()
    def swapped(self) -> Iterator[None]:
        """Inside the block the module carries the averages; after it, its own weights again."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                p.copy_(self.averages[name])
            yield
        finally:
            for name, p in self.parameters.items():
                p.copy_(kept[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name, sharded as the parameters are."""
        return dict(self.averages)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: the averages are those of other parameters.
        """
        check_fits({name: average.shape for name, average in self.averages.items()}, state)
        for name, average in self.averages.items():
            average.copy_(placed(state[name], average))


def check_fits(shapes: dict[str, torch.Size], state: dict[str, Tensor]) -> None:
    """See that averages are those of parameters with these names and shapes.

    Raises:
        CheckpointError: they are those of others.
    """
    differing = sorted(shapes.items() ^ {name: v.shape for name, v in state.items()}.items())
    if differing:
        raise CheckpointError(
            "the checkpoint's averages do not fit this model, beginning with "
            f"'{differing[0][0]}'; resume with the config that wrote it"
        )
