"""Tensor parallelism applied to a model from outside: ranks share the matrices of every block.

A plan names the layers that are cut by their outputs (queries, keys, values, the way into an MLP)
and those cut by their inputs (the ways back), so that only the latter sum over ranks (Shoeybi et
al. 2019, arXiv 1909.08053). torch's parallel styles place the parameters as DTensors; what flows
between them is plain, and what is not cut every rank does in full and alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from opensora.config import Config
from opensora.dist.mesh import Mesh
from opensora.models.mmdit import MMDiT, MMDiTConfig
from opensora.ops.layers import RMSNorm, normalise

Styles = dict[str, ParallelStyle]


class NormOfSomeHeads(ParallelStyle):
    """A norm whose weight is every head's: each rank has the gradient of its heads, and the weight
    gets their sum."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, RMSNorm)
        group = device_mesh.get_group()
        module.forward = lambda x: normalise(x, _Shared.apply(module.weight, group))
        return module


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _mmdit(model: MMDiT) -> Styles:
    """Whole heads, the hidden features of MLPs, and modulations, which are put together again."""
    attention: Styles = {
        "q": ColwiseParallel(),
        "k": ColwiseParallel(),
        "v": ColwiseParallel(),
        "q_norm": NormOfSomeHeads(),
        "k_norm": NormOfSomeHeads(),
        "proj": RowwiseParallel(),
    }
    mlp: Styles = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
    modulation = ColwiseParallel(output_layouts=Replicate())
    stream: Styles = {"mod": modulation}
    stream |= {f"attn.{name}": style for name, style in attention.items()}
    stream |= {f"mlp.{name}": style for name, style in mlp.items()}
    plan = {f"single_blocks.*.{name}": style for name, style in stream.items()}
    if len(model.double_blocks):
        for name, style in stream.items():
            plan |= {f"double_blocks.*.{name}": style, f"double_blocks.*.text_{name}": style}
    return plan


PLANS: dict[type[nn.Module], Callable[[Any], Styles]] = {MMDiT: _mmdit}
"""How the layers of a model are cut, by paths below it."""

DEALT: dict[type[Config], Callable[[Any], Mapping[str, int]]] = {
    MMDiTConfig: lambda config: {
        "num_heads": config.num_heads,
        "width x mlp_ratio": int(config.width * config.mlp_ratio),
    }
}
"""What is dealt to ranks evenly, by the config of a model that has a plan."""


def check(config: Config, degree: int) -> None:
    """Refuse what `degree` ranks cannot share.

    Args:
        config: of the model.

    Raises:
        ValueError: the model has no plan, or its heads or hidden features do not divide.
    """
    if degree == 1:
        return
    if type(config) not in DEALT:
        known = ", ".join(kind.model_fields["kind"].default for kind in DEALT)
        raise ValueError(
            f"parallel.tp={degree}: a model of kind '{getattr(config, 'kind', '')}' has no plan "
            f"for it; set parallel.tp=1 (parallel.ulysses shares clips), or use {known}"
        )
    for name, count in DEALT[type(config)](config).items():
        if count % degree:
            raise ValueError(f"parallel.tp={degree} does not divide the model's {name}, {count}")


def imagine(model: nn.Module, degree: int) -> None:
    """Cut a model that has no data as `apply` does, down to what one of `degree` ranks has of it.

    What ranks would send has its shape and nothing else.
    """
    if degree == 1:
        return
    plan = next(plan for kind, plan in PLANS.items() if isinstance(model, kind))
    for pattern, style in plan(model).items():
        path, _, name = pattern.rpartition(".")
        for parent, module in model.named_modules():
            if fnmatch(parent, path) and isinstance(
                layer := getattr(module, name, None), nn.Linear
            ):
                setattr(module, name, _narrowed(layer, style, degree))


def _narrowed(layer: nn.Linear, style: ParallelStyle, degree: int) -> nn.Module:
    """A rank's part of a layer; a bias that is added to a sum is whole on every rank."""
    if isinstance(style, RowwiseParallel):
        return nn.Linear(layer.in_features // degree, layer.out_features)
    part = nn.Linear(layer.in_features, layer.out_features // degree)
    assert isinstance(style, ColwiseParallel)
    return _Gathered(part, degree) if style.output_layouts[0].is_replicate() else part


class _Gathered(nn.Module):
    """A layer's part whose outputs ranks put together."""

    def __init__(self, part: nn.Linear, degree: int):
        super().__init__()
        self.part, self.degree = part, degree

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.part(x)] * self.degree, dim=-1)


def apply(model: nn.Module, mesh: Mesh) -> None:
    """Place a model's parameters, which are the same on every rank; names stay. Collective."""
    if mesh.layout.tp == 1:
        return
    plan = next(plan for kind, plan in PLANS.items() if isinstance(model, kind))
    parallelize_module(model, mesh.devices["tp"], plan(model), src_data_rank=None)
