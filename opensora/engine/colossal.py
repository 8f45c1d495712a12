"""ColossalAI's Booster behind the same five verbs: its DDP plugin trains.

Its other plugins are translated, not run: ZeRO and Gemini ask for a GPU and for ColossalAI's own
fused Adam, and tensor parallelism for a policy of every model. What they would be given is
`translate`; `fsdp` and `deepspeed` do the same work here. Its pins share an environment with
nothing: scripts/colossal.sh makes one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from opensora.config import Config
from opensora.dist.mesh import Layout, Mesh
from opensora.engine import interface
from opensora.engine.interface import Engine, Optimizers, State, Update
from opensora.errors import MissingPackageError, UsageError
from opensora.runtime import Runtime

Plugin = Literal["ddp", "low_level_zero", "gemini", "hybrid_parallel"]

STAGES: dict[Plugin, tuple[int, ...]] = {
    "ddp": (0,),
    "low_level_zero": (1, 2),
    "gemini": (2, 3),
    "hybrid_parallel": (0, 1, 2),
}
"""What each plugin can shard: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""


class ColossalConfig(Config):
    """A Booster with one of its plugins; only ddp is run by this project."""

    kind: Literal["colossal"] = "colossal"
    plugin: Plugin = "ddp"
    stage: Literal[0, 1, 2, 3] = Field(
        default=0, description="of ZeRO; low_level_zero has 1 and 2, gemini 2 and 3"
    )
    offload: bool = Field(default=False, description="optimizer state in host memory")
    bucket_mb: int = Field(default=25, ge=1, description="gradients that are reduced at a time")

    @model_validator(mode="after")
    def _stage_fits(self) -> ColossalConfig:
        known = STAGES[self.plugin]
        if self.stage not in known:
            told = " or ".join(map(str, known))
            raise ValueError(f"plugin={self.plugin} has no stage {self.stage}: set stage={told}")
        if self.offload and self.stage == 0:
            raise ValueError("offload needs sharded state: set stage=1, 2 or 3")
        return self


def translate(
    config: ColossalConfig, layout: Layout, *, precision: torch.dtype, max_norm: float
) -> tuple[str, dict[str, Any]]:
    """The class of a plugin in `colossalai.booster.plugin`, and its arguments (0.5.0).

    Args:
        max_norm: gradients are clipped to it by plugins that shard them.
    """
    if config.plugin == "ddp":
        return "TorchDDPPlugin", {"bucket_cap_mb": config.bucket_mb}
    common = {
        "precision": "bf16" if precision == torch.bfloat16 else "fp32",
        "max_norm": max_norm,
    }
    if config.plugin == "gemini":
        return "GeminiPlugin", {
            **common,
            "placement_policy": "static",
            "shard_param_frac": 1.0 if config.stage == 3 else 0.0,
            "offload_optim_frac": float(config.offload),
            "enable_gradient_accumulation": True,
            "tp_size": layout.tp,
        }
    # Buckets are counted in millions of elements, which are float32 here.
    size = max(1, config.bucket_mb // 4)
    if config.plugin == "low_level_zero":
        return "LowLevelZeroPlugin", {
            **common,
            "stage": config.stage,
            "reduce_bucket_size_in_m": size,
            "cpu_offload": config.offload,
        }
    return "HybridParallelPlugin", {
        **common,
        "tp_size": layout.tp,
        "pp_size": 1,
        "zero_stage": config.stage,
        "zero_bucket_size_in_m": size,
        "ddp_bucket_cap_mb": config.bucket_mb,
        "cpu_offload": config.offload,
    }


def check(config: ColossalConfig) -> None:
    """Refuse what was never run.

    Raises:
        UsageError: with what does the same.
    """
    if config.plugin != "ddp":
        instead = {0: "local", 3: "fsdp"}.get(config.stage, "deepspeed")
        raise UsageError(
            f"engine.plugin={config.plugin} is translated for ColossalAI, but nothing has run it, "
            f"so it does not train: set engine.kind={instead}, or engine.plugin=ddp"
        )


def load() -> tuple[Any, Any]:
    """ColossalAI's booster and its plugins.

    Raises:
        MissingPackageError: it is not in this environment.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fused kernels that it does without
            from colossalai import booster
            from colossalai.booster import plugin
    except ImportError as error:
        raise MissingPackageError(
            f"engine.kind=colossal needs ColossalAI ({error}): bash scripts/colossal.sh makes an "
            "environment that has it and prints its python"
        ) from None
    return booster, plugin


class ColossalEngine(Engine):
    """Full parameters on every rank; ColossalAI's booster averages gradients."""

    collective = False

    def __init__(
        self, runtime: Runtime, mesh: Mesh | None, config: ColossalConfig, *, precision: torch.dtype
    ):
        check(config)
        if mesh is None:
            raise UsageError(
                "engine.kind=colossal needs several ranks: start it with torchrun "
                "--nproc-per-node N, or set engine.kind=local"
            )
        self.runtime, self.mesh, self.config, self.precision = runtime, mesh, config, precision
        self.optimizers: Optimizers = []
        self._boosted: Any = None

    def wrap(self, module: nn.Module, build: Callable[[nn.Module], Optimizers]) -> None:
        booster, plugins = load()
        self.module, self.optimizers = module, build(module)
        name, arguments = translate(
            self.config, self.mesh.layout, precision=self.precision, max_norm=0.0
        )
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
        self._booster = booster.Booster(plugin=getattr(plugins, name)(**arguments))
        # It knows one optimizer, and only hands losses through it.
        self._boosted, self._handle, *_ = self._booster.boost(module, self.optimizers[0])

    def backward(self, *inputs: Any, last: bool = True, weight: float = 1.0) -> Any:
        with nullcontext() if last else self._booster.no_sync(self._boosted, self._handle):
            with self.autocast():
                output = self._boosted(*inputs)
            self._booster.backward(output.total * weight, self._handle)
        return output

    def autocast(self) -> torch.autocast:
        device = self.runtime.device.type
        return torch.autocast(device, self.precision, self.precision != torch.float32)

    def step(
        self, *, scale: float, max_norm: float, factor: float, accept: Callable[[float], bool]
    ) -> Update:
        return interface.update(
            self.module,
            self.optimizers,
            scale=scale * self.runtime.world_size,  # the plugin divides by the number of ranks
            max_norm=max_norm,
            factor=factor,
            accept=accept,
        )

    def state_dict(self) -> State:
        return interface.collect(self.module, self.optimizers)

    def load_state_dict(self, state: State) -> None:
        interface.restore(self.module, self.optimizers, state)
