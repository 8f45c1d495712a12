"""Less memory for activations, applied to a model from outside; every policy leaves values alone.

Blocks or pairs of blocks are computed again in the backward pass, in tiles or whole, and what still
has to be kept is moved to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from opensora.config import Config
from opensora.engine import tiles
from opensora.engine.flops import repeated
from opensora.engine.host import keep_on_host
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
        description="none keeps everything; block keeps the input of every block; pair that of two "
        "neighbours together, in an STDiT a spatial and a temporal block with the exchanges of "
        "ranks; selective keeps block inputs and what attention gave (output and log-sum-exp)",
    )
    tiles: int = Field(
        default=1,
        ge=1,
        description="blocks run on about this many parts of their tokens one after the other, by "
        "frames, by places or by tokens, so that what lies within them is never whole",
    )
    offload: bool = Field(
        default=False, description="move what is kept to pinned host memory (a GPU's)"
    )

    @model_validator(mode="after")
    def _tiles_are_recomputed(self) -> RecomputeConfig:
        if self.tiles > 1 and self.policy == "none":
            raise ValueError(
                f"tiles={self.tiles} needs a policy, because a tile is computed again in the "
                "backward pass: set recompute.policy=block, or pair, which keeps less"
            )
        return self


def apply(
    model: nn.Module,
    config: RecomputeConfig,
    *,
    compile_blocks: Callable[[list[nn.Module]], None] = lambda blocks: None,
) -> None:
    """Change how the blocks of a model run while gradients are asked for.

    Args:
        compile_blocks: compiles them in place. Recomputation of whole blocks is within what is
            compiled; tiles and pairs are around it.
    """
    blocks = list(model.blocks)  # type: ignore[arg-type]
    selective = config.policy == "selective"
    if selective and config.tiles > 1 and not all(map(tiles.divisible, blocks)):
        raise UsageError(
            f"recompute.tiles={config.tiles} does not go with policy=selective for a "
            f"{type(model).__name__}, whose attention sees everything at once: set "
            "recompute.policy=block"
        )
    run = partial(_checkpointed, context=_saving_attention if selective else None)
    for block in blocks if selective or config.policy == "block" else ():
        if selective or config.tiles == 1 or not tiles.divisible(block):
            block.forward = partial(tiles.joined, block, block.forward, config.tiles, run)
    compile_blocks(blocks)
    if config.tiles > 1 and not selective:
        for part in filter(tiles.divisible, model.modules()):
            tiles.apply(part, config.tiles)
    keep = _offloaded if config.offload else _plain
    if config.policy == "pair":
        model.group = lambda call, *inputs: keep(_checkpointed, call, *inputs)  # pyright: ignore[reportArgumentType]
    elif config.offload:
        for block in blocks:
            block.forward = partial(keep, block.forward)


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
    if not torch.compiler.is_compiling():
        context = partial(_contexts, context)
    options: dict[str, Any] = {} if context is None else {"context_fn": context}
    return checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def _contexts(context: Call | None) -> tuple[Any, Any]:
    """Contexts of the forward pass and of its repetition."""
    first, again = context() if context is not None else (nullcontext(), nullcontext())
    return first, _both(repeated(), again)


@contextmanager
def _both(outer: Any, inner: Any) -> Iterator[None]:
    with outer, inner:
        yield


def _saving_attention() -> Any:
    """Contexts of torch's selective checkpointing that keep results of attention."""

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if _attends(operator):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _offloaded(call: Call, *inputs: Any) -> Any:
    """call(*inputs), with what it keeps for the backward pass on the host."""
    if not torch.is_grad_enabled():
        return call(*inputs)
    with keep_on_host():
        return call(*inputs)
