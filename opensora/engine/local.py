"""The reference engine: one process, or plain data parallelism under torchrun.

An engine is five verbs: wrap, backward, step, state_dict, load_state_dict. The trainer knows no
more, so that engines can be exchanged by config.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from opensora.config import Config
from opensora.errors import CheckpointError
from opensora.runtime import Runtime


class LocalConfig(Config):
    """One process, or DistributedDataParallel over all ranks."""

    kind: Literal["local"] = "local"


@dataclass(frozen=True)
class Update:
    """What a step did: the global gradient norm, and whether the weights moved."""

    gradient_norm: float
    accepted: bool


class LocalEngine:
    """Full parameters on every rank; gradients are averaged by DistributedDataParallel."""

    def __init__(self, runtime: Runtime, *, precision: torch.dtype = torch.float32):
        self.runtime = runtime
        self.precision = precision
        self.module: nn.Module
        self.optimizers: list[torch.optim.Optimizer] = []
        self._wrapped: nn.Module

    def wrap(self, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        """Take charge of a module, already on the device, and of its optimizers."""
        self.module, self.optimizers = module, optimizers
        self._wrapped = module
        if self.runtime.world_size > 1:
            # Strides of dims of size 1 mean nothing, yet 1x1x1 kernels make it warn of them.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
            ids = [self.runtime.device.index] if self.runtime.device.type == "cuda" else None
            self._wrapped = DistributedDataParallel(module, device_ids=ids)

    def backward(self, *inputs: Any, last: bool = True) -> Any:
        """Run the module on a micro-batch and add its gradients; returns the module's output.

        The output's `total` is differentiated. Ranks exchange gradients at the last micro-batch.
        """
        waits = isinstance(self._wrapped, DistributedDataParallel) and not last
        with self._wrapped.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with self.autocast():
                output = self._wrapped(*inputs)
            output.total.backward()
        return output

    def autocast(self) -> torch.autocast:
        """The precision that the module runs in, as a context."""
        device = self.runtime.device.type
        return torch.autocast(device, self.precision, self.precision != torch.float32)

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
        # DDP divides by the number of ranks; the loss is a sum over all of them.
        scale = scale * self.runtime.world_size
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) * scale
        accepted = accept(norm)
        if accepted:
            torch._foreach_mul_(gradients, scale * min(1.0, max_norm / (norm + 1e-6)))
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return Update(norm, accepted)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Weights and optimizer state as flat tables of tensors keyed by parameter name."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        state: dict[str, Tensor] = {}
        for optimizer in self.optimizers:
            for parameter, values in optimizer.state.items():
                for key, value in values.items():
                    state[f"{names[id(parameter)]}/{key}"] = torch.as_tensor(value)
        return {"weights": dict(self.module.state_dict()), "optimizer": state}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: naming the tensors that are missing, left over or of another shape.
        """
        load_weights(self.module, state["weights"])
        parameters = dict(self.module.named_parameters())
        owner = {
            id(p): o for o in self.optimizers for group in o.param_groups for p in group["params"]
        }
        for name, value in state["optimizer"].items():
            parameter_name, _, key = name.rpartition("/")
            parameter = parameters.get(parameter_name)
            if parameter is None or id(parameter) not in owner:
                raise CheckpointError(
                    f"the checkpoint has optimizer state for '{parameter_name}', which this model "
                    "does not train; resume with the config that wrote it"
                )
            if value.dim():  # counters stay where the optimizer keeps them, on the CPU
                value = value.to(parameter.device)
            owner[id(parameter)].state[parameter][key] = value.clone()


def load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights into a module, strictly.

    Raises:
        CheckpointError: listing the first names that are missing, left over or misshapen.
    """
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" * (len(problems) > 5))
        raise CheckpointError(f"these weights do not fit the configured model: {shown}")
    module.load_state_dict(weights)
