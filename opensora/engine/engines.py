"""The engines by name, and how one is made."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from opensora.dist.mesh import Layout, Mesh, ParallelConfig
from opensora.engine import colossal, deepspeed, zero
from opensora.engine.colossal import ColossalConfig, ColossalEngine
from opensora.engine.compiling import CompileChoice
from opensora.engine.deepspeed import DeepspeedEngine
from opensora.engine.deferred import Recipe
from opensora.engine.fsdp import FsdpConfig, FsdpEngine
from opensora.engine.interface import Engine
from opensora.engine.local import LocalConfig, LocalEngine
from opensora.engine.planner import Held
from opensora.engine.zero import DeepspeedConfig
from opensora.runtime import Runtime

AnyEngineConfig = LocalConfig | FsdpConfig | DeepspeedConfig | ColossalConfig
EngineConfig = Annotated[AnyEngineConfig, Field(discriminator="kind")]


def shards(config: AnyEngineConfig) -> bool:
    """Whether an engine shards parameters or what belongs to them."""
    if isinstance(config, DeepspeedConfig):
        return config.stage > 0
    return isinstance(config, FsdpConfig)


def fills(config: AnyEngineConfig) -> bool:
    """Whether an engine can take a model without weights and fill its parts (`Recipe`)."""
    return isinstance(config, FsdpConfig)


def check(
    config: AnyEngineConfig,
    parallel: ParallelConfig,
    *,
    optim: str,
    stored: bool,
    compiled: CompileChoice,
) -> None:
    """Refuse what an engine cannot do, from the config alone.

    Args:
        optim: kind of the optimizer.
        stored: whether its state is kept in another dtype or place than it works with.
        compiled: the config's `compile`.

    Raises:
        UsageError: with what to change.
    """
    if isinstance(config, DeepspeedConfig):
        zero.check(config, parallel, optim=optim, stored=stored, compiled=compiled)
    if isinstance(config, ColossalConfig):
        colossal.check(config)


def compiles(config: AnyEngineConfig) -> bool:
    """Whether compile=auto may compile under an engine."""
    return not (isinstance(config, DeepspeedConfig) and config.stage == 3)


def held(config: AnyEngineConfig, layout: Layout, parameters: int) -> Held:
    """What a rank of a layout holds of a model with so many parameters."""
    if isinstance(config, DeepspeedConfig):
        return zero.held(config, layout.world_size, parameters)
    if isinstance(config, FsdpConfig):
        part = 1 / (layout.dp_shard * layout.sequence)
        return Held(False, part, part, part, part, gathered=True)
    buckets = 1.0 if layout.world_size > 1 else 0.0  # of DistributedDataParallel
    return Held(gradients=buckets)


def find(config: AnyEngineConfig, device: torch.device) -> None:
    """See that the package of an engine is here, before anything takes time.

    Raises:
        MissingPackageError: it is not.
    """
    if isinstance(config, DeepspeedConfig):
        deepspeed.load(device)
    if isinstance(config, ColossalConfig):
        colossal.load()


def build(
    config: AnyEngineConfig,
    runtime: Runtime,
    mesh: Mesh | None,
    *,
    precision: torch.dtype,
    recipe: Recipe | None = None,
) -> Engine:
    """The engine of a config.

    Args:
        mesh: None on one rank.
        recipe: fills a model that has no weights yet; only for engines that `fills` names.

    Raises:
        UsageError: it cannot work with these ranks or in this precision.
    """
    if isinstance(config, FsdpConfig):
        return FsdpEngine(runtime, mesh, config, precision, recipe)
    if isinstance(config, DeepspeedConfig):
        return DeepspeedEngine(runtime, config, precision=precision)
    if isinstance(config, ColossalConfig):
        return ColossalEngine(runtime, mesh, config, precision=precision)
    return LocalEngine(runtime, mesh, precision=precision)
