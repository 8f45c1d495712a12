"""Fully sharded data parallelism (torch's FSDP2): parameters, gradients and optimizer state.

Every block is a unit that is gathered when it is used and let go after. Parameters are sharded over
dp_shard, ring and ulysses together and copied over dp_replicate (HSDP). FSDP's own division of
gradients is off: the trainer divides the sum by the global count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from opensora.config import Config
from opensora.dist.mesh import Mesh
from opensora.dist.sharded import placed
from opensora.engine import interface
from opensora.engine.deferred import Recipe
from opensora.engine.interface import Engine, Optimizers, State, Update
from opensora.errors import UsageError
from opensora.runtime import Runtime


class FsdpConfig(Config):
    """FSDP2 over the axes dp_shard, ring and ulysses; HSDP with dp_replicate."""

    kind: Literal["fsdp"] = "fsdp"
    reshard_after_forward: bool = Field(
        default=True,
        description="let a block's parameters go after its forward pass and gather them again for "
        "its backward pass (ZeRO-3); false keeps them in between (ZeRO-2)",
    )
    gather_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="in which parameters are gathered; bf16 halves the traffic and rounds what "
        "precision bf16 rounds anyway, and a little more (norms, tables)",
    )


class FsdpEngine(Engine):
    """Sharded parameters; every rank takes part in every call of the model."""

    collective = True

    def __init__(
        self,
        runtime: Runtime,
        mesh: Mesh | None,
        config: FsdpConfig,
        dtype: torch.dtype,
        recipe: Recipe | None = None,
    ):
        if mesh is None:
            raise UsageError(
                "engine.kind=fsdp needs several ranks: start it with torchrun "
                "--nproc-per-node N, or set engine.kind=local"
            )
        if config.gather_dtype == "bf16" and dtype != torch.bfloat16:
            raise UsageError("engine.gather_dtype=bf16 needs precision=bf16")
        self.runtime, self.config, self.precision = runtime, config, dtype
        self._recipe = recipe
        self._mesh = _fsdp_mesh(mesh)
        self._shared = mesh.layout.tp
        self.optimizers: Optimizers = []
        self._roots: list[Any] = []

    def wrap(self, module: nn.Module, build: Callable[[nn.Module], Optimizers]) -> None:
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.config.gather_dtype == "bf16":
            policy = MixedPrecisionPolicy(
                torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        options = {"mesh": self._mesh, "mp_policy": policy}
        self._roots = [part for part in module.children() if list(part.parameters())]
        for root in self._roots:
            for block in getattr(root, "blocks", ()):
                reshard = self.config.reshard_after_forward
                fully_shard(block, reshard_after_forward=reshard, **options)
                block.register_forward_hook(_let_go)
            fully_shard(root, reshard_after_forward=True, **options)
            if hasattr(root, "encode"):
                register_fsdp_forward_method(root, "encode")
            for part in root.modules():
                if hasattr(part, "set_gradient_divide_factor"):
                    part.set_gradient_divide_factor(1.0)  # type: ignore[operator]
                    # Plain sums: gloo knows no others.
                    part.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
        if self._recipe is not None:
            self._fill(self._recipe)
        self.module, self.optimizers = module, build(module)

    @torch.no_grad()
    def _fill(self, recipe: Recipe) -> None:
        """Give memory and first weights to what was built without; a rank keeps its shards only."""
        known: dict[str, Tensor] = {}
        for root in self._roots:
            if any(p.is_meta for p in root.parameters()):
                root.to_empty(device=self.runtime.device)
                known |= {**dict(root.named_parameters()), **dict(root.named_buffers())}
        recipe.pour(lambda name, value: known[name].copy_(placed(value, known[name])))
        self._recipe = None

    def backward(self, *inputs: Any, last: bool = True, weight: float = 1.0) -> Any:
        for root in self._roots:
            root.set_requires_gradient_sync(last)
        with self.autocast():
            output = self.module(*inputs)
        (output.total * weight).backward()
        return output

    def autocast(self) -> torch.autocast:
        # Cached casts would keep all weights gathered, in half the size, to the end of the pass.
        device, enabled = self.runtime.device.type, self.precision != torch.float32
        return torch.autocast(device, self.precision, enabled, cache_enabled=False)

    def step(
        self, *, scale: float, max_norm: float, factor: float, accept: Callable[[float], bool]
    ) -> Update:
        return interface.update(
            self.module,
            self.optimizers,
            scale=scale * self._shared,  # ranks that share layers have counted the same loss
            max_norm=max_norm,
            factor=factor,
            accept=accept,
        )

    def state_dict(self) -> State:
        return interface.collect(self.module, self.optimizers)

    def load_state_dict(self, state: State) -> None:
        interface.restore(self.module, self.optimizers, state)


def _let_go(block: Any, inputs: Any, output: Any) -> None:
    """Without a backward pass nothing is kept: averages are swapped in between two calls."""
    if not torch.is_grad_enabled():
        block.reshard()


def _fsdp_mesh(mesh: Mesh) -> DeviceMesh:
    """(shard,) or (replicate, shard), where shard joins dp_shard, ring and ulysses."""
    from torch.distributed.device_mesh import init_device_mesh

    layout = mesh.layout
    if layout.tp > 1:
        return mesh.devices["shard" if layout.dp_replicate == 1 else ("replicate", "shard")]
    shard = layout.dp_shard * layout.sequence
    if layout.dp_replicate == 1:
        return init_device_mesh(mesh.device_type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(
        mesh.device_type, (layout.dp_replicate, shard), mesh_dim_names=("replicate", "shard")
    )
