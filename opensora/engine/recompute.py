"""Less memory for activations, applied to a model from outside; every policy leaves values alone.

In the order in which they are applied: token-wise parts in tiles, blocks or pairs of blocks that
are computed again in the backward pass, and what still has to be kept moved to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from opensora.config import Config
from opensora.errors import UsageError
from opensora.ops.backends import BACKENDS
from opensora.ops.selection import Selection

Call = Callable[..., Any]

ATTENTION = frozenset(name for backend in BACKENDS.values() for name in backend.operators)
"""Operators, as 'namespace.name', that selective recomputation keeps the results of."""


class RecomputeConfig(Config):
    """What is computed again instead of being kept for the backward pass."""

    policy: Literal["none", "block", "pair", "selective"] = Field(
        default="none",
        description="none keeps everything; block keeps the input of every block; pair that of a "
        "spatial and a temporal block together, exchanges between ranks included; selective keeps "
        "block inputs and what attention gave (output and log-sum-exp)",
    )
    tiles: int = Field(
        default=1,
        ge=1,
        description="attention within blocks, cross-attention and MLP run on this many parts of "
        "their tokens one after the other, so that what lies within them is never whole",
    )
    offload: bool = Field(
        default=False, description="move what is kept to pinned host memory (a GPU's)"
    )


def apply(model: nn.Module, config: RecomputeConfig) -> None:
    """Change how the blocks of a model run while gradients are asked for."""
    blocks = list(model.blocks)  # type: ignore[arg-type]
    if config.tiles > 1:
        for block in blocks:
            _tile(block, config.tiles)
    keep = partial(_offloaded, config.offload)
    if config.policy == "pair":
        model.group = lambda call, *inputs: keep(_checkpointed, call, *inputs)
    for block in blocks if config.policy in ("block", "selective") else ():
        context = _saving_attention if config.policy == "selective" else None
        block.forward = partial(keep, _checkpointed, block.forward, context=context)
    if config.policy == "none" and config.offload:
        for block in blocks:
            block.forward = partial(keep, _plain, block.forward)


@cache
def _attends(operator: Any) -> bool:
    return str(getattr(operator, "overloadpacket", operator)) in ATTENTION


def check(config: RecomputeConfig, attention: Selection) -> None:
    """Refuse to keep what attention gave where its operators are not known here.

    Raises:
        UsageError: the policy is selective, and attention ran none of `ATTENTION`.
    """
    if config.policy != "selective":
        return
    for name, ran in zip(attention.names, attention.operators, strict=True):
        if not ran & ATTENTION:
            raise UsageError(
                f"recompute.policy=selective keeps what attention's kernel gave, but "
                f"attention={name} runs none that is known here, only {', '.join(sorted(ran))}: "
                "set recompute.policy=block or another attention"
            )


def _plain(call: Call, *inputs: Any) -> Any:
    return call(*inputs)


def _checkpointed(call: Call, *inputs: Any, context: Call | None = None) -> Any:
    """Keep the inputs only. Nothing in a block draws random numbers, so no state is stashed."""
    if not torch.is_grad_enabled():
        return call(*inputs)
    options = {} if context is None else {"context_fn": context}
    return checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def _saving_attention() -> Any:
    """Contexts of torch's selective checkpointing that keep results of attention."""

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if _attends(operator):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _offloaded(offload: bool, run: Call, call: Call, *inputs: Any, **options: Any) -> Any:
    """run(call, *inputs), with what it keeps for the backward pass on the host."""
    if not offload or not torch.is_grad_enabled():
        return run(call, *inputs, **options)
    pinned = torch.cuda.is_available()
    with torch.autograd.graph.save_on_cpu(pin_memory=pinned):
        return run(call, *inputs, **options)


def _tile(block: nn.Module, tiles: int) -> None:
    """Run the parts of a block tile by tile: sequences are independent of each other in its
    self-attention, tokens in its cross-attention and MLP."""
    for name, dim in (("attn", 0), ("cross_attn", 1)):
        part = block.get_submodule(name)
        part.forward = partial(_in_tiles, part.forward, tiles, dim)
    mlp = block.get_submodule("mlp")
    mlp.forward = partial(_tokens_in_tiles, mlp.forward, tiles)


def _in_tiles(call: Call, tiles: int, dim: int, x: Tensor, *rest: Any) -> Tensor:
    parts = [part for part in x.chunk(tiles, dim) if part.numel()]
    if len(parts) < 2:
        return call(x, *rest)
    return torch.cat([_checkpointed(call, part, *rest) for part in parts], dim)


def _tokens_in_tiles(call: Call, tiles: int, x: Tensor) -> Tensor:
    """(..., D) -> (..., D), whatever the dims before the last are."""
    return _in_tiles(call, tiles, 0, x.flatten(0, -2)).unflatten(0, x.shape[:-1])
