"""The reference engine: one process, or plain data parallelism under torchrun."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from opensora.config import Config
from opensora.dist.mesh import Mesh
from opensora.dist.sharded import local
from opensora.engine import interface
from opensora.engine.interface import Engine, Optimizers, State, Update
from opensora.runtime import Runtime


class LocalConfig(Config):
    """One process, or DistributedDataParallel over all ranks."""

    kind: Literal["local"] = "local"


class LocalEngine(Engine):
    """Full parameters on every rank, or its part of them where layers are shared.

    DistributedDataParallel averages gradients. With shared layers, which it does not know, they are
    added up after the last micro-batch over the ranks that have the same part.
    """

    def __init__(
        self,
        runtime: Runtime,
        mesh: Mesh | None = None,
        *,
        precision: torch.dtype = torch.float32,
    ):
        self.runtime, self._mesh = runtime, mesh
        self._shared = 1 if mesh is None else mesh.layout.tp
        self.collective = self._shared > 1
        self.precision = precision
        self.optimizers: Optimizers = []
        self._wrapped: nn.Module

    def wrap(self, module: nn.Module, build: Callable[[nn.Module], Optimizers]) -> None:
        self.module, self.optimizers = module, build(module)
        self._wrapped = module
        if self.runtime.world_size > 1 and self._shared == 1:
            # Strides of dims of size 1 mean nothing, yet 1x1x1 kernels make it warn of them.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
            ids = [self.runtime.device.index] if self.runtime.device.type == "cuda" else None
            self._wrapped = DistributedDataParallel(module, device_ids=ids)

    def backward(self, *inputs: Any, last: bool = True, weight: float = 1.0) -> Any:
        waits = isinstance(self._wrapped, DistributedDataParallel) and not last
        with self._wrapped.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with self.autocast():
                output = self._wrapped(*inputs)
            (output.total * weight).backward()
        if last and self._shared > 1:
            self._add_up()
        return output

    def _add_up(self) -> None:
        """Sums of gradients over the ranks with the same part of the layers, in one message."""
        assert self._mesh is not None
        replicas = self._mesh.replicas
        if replicas is None:
            return
        gradients = [local(p.grad) for p in self.module.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat, group=replicas.group)
        for gradient, total in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(total.view(gradient.shape))

    def autocast(self) -> torch.autocast:
        device = self.runtime.device.type
        return torch.autocast(device, self.precision, self.precision != torch.float32)

    def step(
        self, *, scale: float, max_norm: float, factor: float, accept: Callable[[float], bool]
    ) -> Update:
        return interface.update(
            self.module,
            self.optimizers,
            # DDP divides by the number of ranks; the loss is a sum over all of them. Ranks that
            # share layers have counted the same loss.
            scale=scale * (self._shared if self._shared > 1 else self.runtime.world_size),
            max_norm=max_norm,
            factor=factor,
            accept=accept,
        )

    def state_dict(self) -> State:
        return interface.collect(self.module, self.optimizers)

    def load_state_dict(self, state: State) -> None:
        interface.restore(self.module, self.optimizers, state)
