"""What caches need to know of each kind of model beside how its parts run (`engine.sequence`): what
changes first when the level does, and which layers there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from opensora.errors import UsageError
from opensora.models import mmdit, stdit
from opensora.models.mmdit import MMDiT
from opensora.models.stdit import STDiT
from opensora.ops.layers import modulate


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        modulated: (model, stream, frames) -> (B, T, N, D), the normed and modulated tokens that the
            first block's attention sees; `frames` are those of the clip that the stream has.
        layers: (model) -> for each kind of layer that can be broadcast, its modules block by block.
    """

    modulated: Callable[[Any, Any, slice], Tensor]
    layers: Callable[[Any], dict[str, list[list[nn.Module]]]]


def _stdit_modulated(model: STDiT, stream: stdit.Stream, frames: slice) -> Tensor:
    block: Any = model.blocks[0]
    modulation = stream.modulation[:, frames] + block.scale_shift_table  # B T 6 D
    shift, scale = modulation.unsqueeze(3)[:, :, :2].unbind(2)  # B T 1 D each
    return modulate(block.norm1(stream.tokens).to(stream.tokens.dtype), shift, scale)


def _stdit_layers(model: Any) -> dict[str, list[list[nn.Module]]]:
    return {
        "spatial": [[block.attn] for block in model.spatial_blocks],
        "temporal": [[block.attn] for block in model.temporal_blocks],
        "cross": [[block.cross_attn] for block in model.blocks],
        "mlp": [[block.mlp] for block in model.blocks],
    }


def _mmdit_modulated(model: MMDiT, stream: mmdit.Stream, frames: slice) -> Tensor:
    block: Any = model.blocks[0]
    shift, scale = (
        block.mod(stream.level[:, 1:])
        .unsqueeze(2)
        .tensor_split(block.mod.out_features // model.config.width, dim=-1)[:2]
    )  # B T 1 D each
    return modulate(block.norm(stream.tokens), shift, scale)


def _mmdit_layers(model: Any) -> dict[str, list[list[nn.Module]]]:
    double, single = list(model.double_blocks), list(model.single_blocks)
    return {
        "joint": [[b.attn, b.text_attn] for b in double] + [[b.attn] for b in single],
        "mlp": [[b.mlp, b.text_mlp] for b in double] + [[b.mlp] for b in single],
    }


KINDS: dict[type[nn.Module], Kind] = {
    STDiT: Kind(_stdit_modulated, _stdit_layers),
    MMDiT: Kind(_mmdit_modulated, _mmdit_layers),
}


def kind_of(model: nn.Module) -> Kind:
    """What is known of a model.

    Raises:
        UsageError: nothing is.
    """
    for known, kind in KINDS.items():
        if isinstance(model, known):
            return kind
    names = ", ".join(known.__name__ for known in KINDS)
    raise UsageError(
        f"sampling.cache: {type(model).__name__} has no step cache, only {names} have: leave it out"
    )


def rows_of(stream: Any, rows: Tensor) -> Any:
    """The stream of some samples, by their indices (int64)."""
    values = {f.name: getattr(stream, f.name) for f in fields(stream)}
    return replace(stream, **{k: v[rows] for k, v in values.items() if isinstance(v, Tensor)})
