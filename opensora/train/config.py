"""A training run as data: one frozen tree that says everything about it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from opensora import config as configs
from opensora.config import Config
from opensora.data.sources import DataConfig
from opensora.dist.mesh import ParallelConfig
from opensora.engine import engines, tensor
from opensora.engine.compiling import CompileChoice
from opensora.engine.ema import EMAConfig, PowerEMAConfig
from opensora.engine.engines import EngineConfig
from opensora.engine.local import LocalConfig
from opensora.engine.recompute import RecomputeConfig
from opensora.errors import UsageError
from opensora.ops.backends import AttentionChoice
from opensora.train.autoencoder import AutoencoderConfig
from opensora.train.guard import GuardConfig
from opensora.train.optim import MuonConfig, OptimConfig
from opensora.train.text_to_video import TextToVideoConfig
from opensora.train.tracking import LogConfig
from opensora.watchdog import WatchdogConfig

TaskConfig = Annotated[AutoencoderConfig | TextToVideoConfig, Field(discriminator="kind")]

FREE_TO_CHANGE = (
    "output",
    "device",
    "threads",
    "engine",
    "engine.kind",
    "parallel",
    "recompute",
    "attention",
    "optim.offload",
    "optim.adamw.offload",
    "log",
    "checkpoint",
    "samples",
    "evaluation",
    "validation",
    "watchdog",
    "resume_despite",
    "data.num_workers",
    "data.mix",
    "data.manifest",
    "data.cache",
    "data.validation",
    "task.vae_from",
)
"""Keys that may differ before and after a resume: none of them moves a weight. Paths are among
them because what they lead to is compared by its digest, and so is what `data.mix` changes."""


class CheckpointConfig(Config):
    """When to save. The end of a run is always saved."""

    every: int = Field(
        default=500, ge=0, description="steps between checkpoints; 0 saves at the end only"
    )
    keep: int = Field(default=2, ge=1, description="newest checkpoints to keep")
    background: bool = Field(
        default=False,
        description="write while training goes on, from copies in host memory; the one at the end, "
        "or when a signal stops the run, is waited for",
    )


class ValidationConfig(Config):
    """When to measure the validation set."""

    every: int = Field(
        default=500, ge=0, description="steps between passes; 0 measures at the end only"
    )


class SamplesConfig(Config):
    """Sample videos during training."""

    every: int = Field(default=0, ge=0, description="steps between samples; 0 makes none")
    prompts: tuple[str, ...] = ()
    steps: int = Field(default=20, ge=1, description="sampling steps")
    guidance_scale: float = Field(default=3.0, ge=0)

    @model_validator(mode="after")
    def _needs_prompts(self) -> SamplesConfig:
        if self.every and not self.prompts:
            raise ValueError("samples.every is set, but there are no samples.prompts to draw")
        return self


class EvaluationConfig(Config):
    """A suite of `opensora eval` during training, on the averaged weights."""

    every: int = Field(default=0, ge=0, description="steps between evaluations; 0 makes none")
    suite: str = Field(default="arena", description="one of the suites of `opensora eval`")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="of the suite, such as num_prompts: {1: 16}"
    )


class TrainConfig(Config):
    """Everything about a run; written beside its weights."""

    output: Path = Field(description="run folder: checkpoints, metrics, samples")
    seed: int = Field(default=0, ge=0, lt=2**62, description="of all randomness in the run")
    steps: int = Field(ge=1, description="optimizer steps")
    device: str = Field(default="auto", description="auto, cpu, cuda, mps")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads a rank; None: all cores"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="of the model's arithmetic; auto takes bf16 where it is faster"
    )
    compile: CompileChoice = Field(
        default="auto",
        description="torch.compile of the model's blocks: auto does on a GPU with Triton; on a CPU "
        "with a C++ compiler 'always' wins back its minute in long runs",
    )
    attention: AttentionChoice = Field(
        default="auto",
        description="backend of attention without a mask: auto takes cuDNN's on Hopper and "
        "Blackwell, else torch's own choice; a named one is tried at the start and refused where "
        "it cannot serve",
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="samples at a time on a rank, gradients accumulate; the task autoencoder "
        "standardises over these samples, text_to_video does not depend on it",
    )
    max_grad_norm: float = Field(default=1.0, gt=0)
    task: TaskConfig
    data: DataConfig
    optim: OptimConfig = MuonConfig()
    ema: EMAConfig | None = PowerEMAConfig()
    engine: EngineConfig = LocalConfig()
    recompute: RecomputeConfig = Field(
        default=RecomputeConfig(), description="less memory for activations; changes no value"
    )
    parallel: ParallelConfig = Field(
        default=ParallelConfig(), description="how the ranks of torchrun share the work"
    )
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    samples: SamplesConfig = SamplesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    log: LogConfig = LogConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    resume_despite: tuple[str, ...] = Field(
        default=(),
        description="keys, such as steps, optim or data, whose change a resume accepts",
    )

    @model_validator(mode="after")
    def _task_fits(self) -> TrainConfig:
        if self.task.kind == "autoencoder" and self.data.kind == "latents":
            raise ValueError("task autoencoder trains on clips: set data.kind=clips and a manifest")
        if self.compile == "always" and self.task.kind == "autoencoder":
            raise ValueError("compile=always is for the task text_to_video; leave it out here")
        if self.attention != "auto" and self.task.kind == "autoencoder":
            raise ValueError("task autoencoder has no attention; leave attention out here")
        if self.attention == "plain" and self.recompute.policy == "selective":
            raise ValueError(
                "recompute.policy=selective keeps what attention's kernel gave, and "
                "attention=plain has none: set recompute.policy=block or attention=auto"
            )
        if self.compile == "always" and self.parallel.tp > 1:
            raise ValueError("compile=always does not go with parallel.tp; leave one of them out")
        if self.task.kind == "text_to_video":
            tensor.check(self.task.model, self.parallel.tp)
        if self.recompute != RecomputeConfig() and self.task.kind == "autoencoder":
            raise ValueError("recompute is for the task text_to_video; leave it out here")
        if self.task.kind == "autoencoder" and self.data.kind == "synthetic":
            raise ValueError("task autoencoder trains on clips: data.kind=synthetic has latents")
        if self.task.kind == "autoencoder" and self.data.mix == "clips":
            raise ValueError("data.mix=clips is for the task text_to_video; leave it out here")
        for name in ("samples", "evaluation"):
            if getattr(self, name).every and self.task.kind != "text_to_video":
                raise ValueError(f"{name}.every is set, but task {self.task.kind} draws no videos")
        return self

    @model_validator(mode="after")
    def _engine_fits(self) -> TrainConfig:
        engines.check(
            self.engine,
            self.parallel,
            optim=self.optim.kind,
            stored=self.optim.stored_otherwise,
            compiled=self.compile,
        )
        return self

    def json_text(self) -> str:
        """The resolved config as it is written into checkpoints."""
        return configs.to_json(self)

    def check_resumable(self, saved: str, where: str) -> None:
        """Refuse to go on from a checkpoint whose config would not have led here.

        Raises:
            UsageError: naming the first keys that differ.
        """
        free = [*FREE_TO_CHANGE, *self.resume_despite]
        if self.task.kind == "text_to_video":
            free.append("micro_batch")  # gradients of its samples simply add
        changes = [
            (key, change)
            for key, change in _differences(json.loads(self.json_text()), json.loads(saved), "")
            if not _covers(free, key)
        ]
        if changes:
            told = "; ".join(f"{key} {change}" for key, change in changes[:4])
            raise UsageError(
                f"{where} was written by another config: {told}. Use a new output= for the changed "
                f"run, restore the old values, or accept it with resume_despite=[{changes[0][0]}]"
            )

    def accepts_change_of(self, key: str) -> bool:
        """Whether a resume may go on though this key, or what it leads to, has changed."""
        return _covers(self.resume_despite, key)


def _covers(accepted: Iterable[str], key: str) -> bool:
    """Whether a key or a part that it belongs to is accepted. Another `kind` never is."""
    within = any(key == name or key.startswith(f"{name}.") for name in accepted)
    return within and not (key.endswith(".kind") and key not in accepted)


def _differences(mine: object, theirs: object, path: str) -> Iterator[tuple[str, str]]:
    """(dotted key, 'is ..., was ...') of each leaf that differs."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted({*mine, *theirs}):
            yield from _differences(mine.get(key), theirs.get(key), f"{path}.{key}".lstrip("."))
    elif mine != theirs:
        yield path, f"is {mine!r}, was {theirs!r}"
