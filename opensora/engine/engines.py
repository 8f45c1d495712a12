"""The engines by name, and how one is made."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from opensora.dist.mesh import Mesh
from opensora.engine.deferred import Recipe
from opensora.engine.fsdp import FsdpConfig, FsdpEngine
from opensora.engine.interface import Engine
from opensora.engine.local import LocalConfig, LocalEngine
from opensora.runtime import Runtime

EngineConfig = Annotated[LocalConfig | FsdpConfig, Field(discriminator="kind")]


def shards(config: LocalConfig | FsdpConfig) -> bool:
    """Whether an engine shards parameters."""
    return isinstance(config, FsdpConfig)


def build(
    config: LocalConfig | FsdpConfig,
    runtime: Runtime,
    mesh: Mesh | None,
    *,
    precision: torch.dtype,
    recipe: Recipe | None = None,
) -> Engine:
    """The engine of a config.

    Args:
        mesh: None on one rank.
        recipe: fills a model that has no weights yet; only for engines that shard.

    Raises:
        UsageError: it cannot work with these ranks or in this precision.
    """
    if isinstance(config, FsdpConfig):
        return FsdpEngine(runtime, mesh, config, precision, recipe)
    return LocalEngine(runtime, precision=precision)
