"""ZeRO as data: our config, what it refuses, its words for DeepSpeed, what a rank then holds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from opensora.config import Config
from opensora.dist.mesh import ParallelConfig
from opensora.engine.planner import Held
from opensora.errors import UsageError


class DeepspeedConfig(Config):
    """ZeRO over all ranks, whether they share clips or not."""

    kind: Literal["deepspeed"] = "deepspeed"
    stage: Literal[0, 1, 2, 3] = Field(
        default=2,
        description="what is sharded: 0 nothing, 1 optimizer state, 2 gradients as well, 3 "
        "parameters as well",
    )
    offload_optimizer: bool = Field(
        default=False,
        description="keep optimizer state in host memory and update there (stages 1 to 3)",
    )
    bucket: int = Field(
        default=50_000_000,
        ge=1,
        description="elements of gradients that are reduced, and of parameters that are gathered "
        "(stage 3), at a time",
    )

    @model_validator(mode="after")
    def _has_state_to_offload(self) -> DeepspeedConfig:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs sharded state: set stage=1, 2 or 3")
        return self


def check(
    config: DeepspeedConfig, parallel: ParallelConfig, *, optim: str, stored: bool, compiled: str
) -> None:
    """Refuse what this engine cannot do; the arguments are those of `engines.check`.

    Raises:
        UsageError: with what to change.
    """
    if config.stage and optim != "adamw":
        raise UsageError(
            f"optim.kind={optim} needs whole matrices, and engine.kind=deepspeed shards flat parts "
            "of them: set optim.kind=adamw, engine.stage=0 or engine.kind=fsdp"
        )
    if config.stage and stored:
        raise UsageError(
            "optim.state_dtype and optim.offload are not for engine.kind=deepspeed, which keeps "
            "state itself: leave them out, or set engine.offload_optimizer=true"
        )
    if config.stage and (parallel.dp_replicate or 1) > 1:
        raise UsageError(
            f"parallel.dp_replicate={parallel.dp_replicate}: DeepSpeed shards over all ranks. "
            "Leave it out, or set engine.kind=fsdp"
        )
    if config.stage == 3 and compiled == "always":
        raise UsageError(
            "compile=always cannot see the parameters that engine.stage=3 gathers for a moment: "
            "set compile=never or engine.stage=2"
        )


def settings(config: DeepspeedConfig, module: nn.Module, device_type: str) -> dict[str, Any]:
    """Our config in DeepSpeed's words.

    Losses, micro-batches, clipping, schedule and precision stay ours, so none of them is here.
    """
    sizes = [p.numel() for p in module.parameters() if p.requires_grad]
    bucket = max(max(sizes), min(config.bucket, sum(sizes)))
    bucket += bucket % 2  # it asks for an even one
    zero: dict[str, Any] = {
        "stage": config.stage,
        "reduce_bucket_size": bucket,
        "overlap_comm": device_type == "cuda",
    }
    if config.stage < 3:
        zero["allgather_bucket_size"] = bucket
    else:
        zero["stage3_prefetch_bucket_size"] = bucket
        zero["stage3_max_live_parameters"] = 2 * bucket
        zero["stage3_max_reuse_distance"] = bucket
        zero["stage3_param_persistence_threshold"] = 0  # sharded without exception
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device_type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,  # the run's own is put in at every step
        "steps_per_print": 2**62,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def held(config: DeepspeedConfig, ranks: int, parameters: int) -> Held:
    """What a rank holds of a model with so many parameters.

    Found by watching two and four ranks on CPUs (0.19.8), at the worst moment of a step: even in
    float32 the weights that are updated are a copy, and reducing takes copies of gradients.
    """
    if config.stage == 0:
        return Held(gradients=min(1.0, BUCKET_OF_STAGE_0 / max(1, parameters)))
    part, buffers = 1 / ranks, 4.0 * min(config.bucket, parameters)
    copy = 0.0 if config.offload_optimizer else part
    state = 0.0 if config.offload_optimizer else part
    gradients = {1: 2 + part, 2: 1 + 2 * part, 3: 2 * part}[config.stage]
    if config.stage < 3:
        return Held(False, 1 + copy, gradients, 1.0, state, buffers=buffers)
    return Held(False, part + copy, gradients, part, state, gathered=True, buffers=3 * buffers)


BUCKET_OF_STAGE_0 = 500_000_000
"""Elements that DeepSpeed flattens at a time where nothing is sharded."""
