"""What the trainer knows of an engine: five verbs.

An engine decides how parameters and their state are placed on ranks. The trainer knows no more,
so that engines can be exchanged by config, and all of them make the same steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opensora.dist.sharded import alike, norm, placed
from opensora.engine.ema import EMA, Averages, EMAConfig
from opensora.errors import CheckpointError

Optimizers = list[torch.optim.Optimizer]
State = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Update:
    """What a step did: the global gradient norm, and whether the weights moved."""

    gradient_norm: float
    accepted: bool


class Engine(ABC):
    """Places parameters and their state on ranks.

    Attributes:
        module: what is trained.
        collective: whether every call of the module needs all ranks.
    """

    collective: bool
    module: nn.Module

    @abstractmethod
    def wrap(self, module: nn.Module, build: Callable[[nn.Module], Optimizers]) -> None:
        """Take charge of a module, already on the device, and build its optimizers."""

    @abstractmethod
    def backward(self, *inputs: Any, last: bool = True, weight: float = 1.0) -> Any:
        """Run the module on a micro-batch and add its gradients; returns the module's output.

        The output's `total` times `weight` is differentiated. Ranks exchange gradients at the last
        micro-batch.
        """

    @abstractmethod
    def step(
        self, *, scale: float, max_norm: float, factor: float, accept: Callable[[float], bool]
    ) -> Update:
        """Scale and clip the gradients, ask `accept` about their norm, and update or discard.

        Args:
            scale: factor on the sum over ranks, normally 1 / global count.
            max_norm: gradients are clipped to this 2-norm.
            factor: on every group's learning rate.
            accept: sees the norm after scaling; all ranks see the same number.
        """

    @abstractmethod
    def state_dict(self) -> State:
        """'weights' and 'optimizer' state by parameter name, as it lies on the ranks: sharded
        (DTensor), or whole, and then rank 0's is what counts. Collective."""

    @abstractmethod
    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` gave, on every rank, whatever engine gave it.

        Args:
            state: whole tensors, or sharded as `like` says; emptied, to save memory.

        Raises:
            CheckpointError: naming the tensors that are missing, left over or of another shape.
        """

    def averages(self, config: EMAConfig) -> Averages:
        """Averages of the trained weights, placed as the weights are."""
        return EMA(self.module, config)

    @abstractmethod
    def autocast(self) -> torch.autocast:
        """The precision that the module runs in, as a context."""


def update(
    module: nn.Module,
    optimizers: Optimizers,
    *,
    scale: float,
    max_norm: float,
    factor: float,
    accept: Callable[[float], bool],
) -> Update:
    """`Engine.step` where gradients lie in `grad`; `scale` makes them those of the mean loss."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    found = float(norm(gradients)) * scale
    accepted = accept(found)
    if accepted:
        for part in alike(gradients):
            torch._foreach_mul_(part, scale * min(1.0, max_norm / (found + 1e-6)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return Update(found, accepted)


def collect(module: nn.Module, optimizers: Optimizers) -> State:
    """`Engine.state_dict` of a module whose tensors are whole or sharded by torch."""
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        "weights": dict(module.state_dict()),
        "optimizer": {
            f"{names[id(parameter)]}/{key}": torch.as_tensor(value)
            for optimizer in optimizers
            for parameter, values in optimizer.state.items()
            for key, value in values.items()
        },
    }


def like(module: nn.Module) -> Callable[[str], Tensor | None]:
    """The parameter that a name of `collect`'s belongs to, or None: what is read for it is sharded
    as it is."""
    known = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    return lambda name: known.get(name.rpartition("/")[0] or name)


def restore(module: nn.Module, optimizers: Optimizers, state: State) -> None:
    """`Engine.load_state_dict` of such a module; empties `state` as it goes, to save memory."""
    load_weights(module, state.pop("weights"))
    parameters = dict(module.named_parameters())
    owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    optimizer = state.pop("optimizer")
    while optimizer:
        name, value = optimizer.popitem()
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters.get(parameter_name)
        if parameter is None or id(parameter) not in owner:
            raise CheckpointError(not_trained(parameter_name))
        if value.dim():  # counters stay where the optimizer keeps them, on the CPU
            value = placed(value.to(parameter.device, parameter.dtype), parameter)
        owner[id(parameter)].state[parameter][key] = value.clone()


def load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights into a module, strictly.

    Raises:
        CheckpointError: listing the first names that are missing, left over or misshapen.
    """
    own = module.state_dict()
    check_weights({name: value.shape for name, value in own.items()}, weights)
    module.load_state_dict({name: placed(weights[name], value) for name, value in own.items()})


def check_weights(shapes: dict[str, torch.Size], weights: dict[str, Tensor]) -> None:
    """See that weights are those of a model, whose names and shapes are given.

    Raises:
        CheckpointError: listing the first names that are missing, left over or misshapen.
    """
    problems = [f"missing {name}" for name in shapes if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in shapes]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, the model has {tuple(shape)}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" * (len(problems) > 5))
        raise CheckpointError(f"these weights do not fit the configured model: {shown}")


def not_trained(parameter_name: str) -> str:
    """What is told of optimizer state that nobody asks for."""
    return (
        f"the checkpoint has optimizer state for '{parameter_name}', which this model does not "
        "train; resume with the config that wrote it"
    )
