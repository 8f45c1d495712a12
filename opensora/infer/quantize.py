"""Weights of a denoiser's blocks in 8 bits, through torchao; what they multiply stays as it is.

A weight matrix has a scale for each of its rows: int8 rounds to 1 / 254 of a row's largest entry,
fp8 (e4m3) to 1 / 16 of each entry. Embedders, norms, modulation tables and the output stay whole.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from opensora.errors import UsageError, require

Precision = Literal["int8", "fp8"]
BYTES = {"int8": 1, "fp8": 1}
"""Of a weight; the scale of a row is 4 more."""


def linears_of(model: nn.Module) -> list[nn.Linear]:
    """The layers whose weights are made smaller: the linear ones in the blocks."""
    blocks: list[nn.Module] = list(model.blocks)  # type: ignore[arg-type]
    return [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]


def quantize(model: nn.Module, precision: Precision) -> None:
    """Replace the weights of a model that has its last values, in place.

    Args:
        model: in eval mode, weights float32 or bfloat16.

    Raises:
        UsageError: the model is in training.
        MissingPackageError: torchao is not installed.
    """
    if model.training:
        raise UsageError("quantized weights serve sampling only: put the model into eval mode")
    chosen = set(map(id, linears_of(model)))
    library: Any = require(
        "torchao.quantization", extra="quantize", purpose=f"quantize {precision}"
    )
    configs = {
        "int8": library.Int8WeightOnlyConfig,
        "fp8": library.Float8WeightOnlyConfig,
    }
    library.quantize_(model, configs[precision](), filter_fn=lambda module, _: id(module) in chosen)
