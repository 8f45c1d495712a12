"""Step caches on a model, from outside, for the time of one video; then nothing remains of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from opensora.errors import UsageError
from opensora.infer.caching.cache import Cache
from opensora.infer.caching.configs import CacheConfig
from opensora.infer.caching.pyramid import PyramidBroadcast
from opensora.infer.caching.skipping import FirstBlock, TeaCache

CACHES: dict[str, Any] = {
    "pab": PyramidBroadcast,
    "teacache": TeaCache,
    "first_block": FirstBlock,
}
"""Kind of config -> the cache."""


@contextmanager
def applied(model: nn.Module, config: CacheConfig | None) -> Iterator[Cache[Any] | None]:
    """Inside it the model spares work. Give `tick` of what it yields after every step.

    Args:
        model: in eval mode; exactly as it was when the context ends.
        config: None does nothing.

    Raises:
        UsageError: the model is in training, has no such cache, or has one already.
    """
    if config is None:
        yield None
        return
    if model.training:
        raise UsageError("a step cache serves sampling only: put the model into eval mode")
    if isinstance(vars(model).get("forward"), Cache):
        raise UsageError("this model has a step cache already: one video at a time")
    cache = build(model, config)
    with ExitStack() as stack:
        patch = partial(_patch, stack)
        cache.patched(patch)
        patch(model, "forward", cache)
        yield cache


def build(model: nn.Module, config: CacheConfig) -> Cache[Any]:
    """The cache that a config describes."""
    return CACHES[config.kind](model, config)


def _patch(stack: ExitStack, owner: nn.Module, name: str, value: Any) -> None:
    """Set an attribute of one object; the stack undoes it."""
    own = vars(owner)
    if name in own:
        stack.callback(setattr, owner, name, own[name])
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, value)
