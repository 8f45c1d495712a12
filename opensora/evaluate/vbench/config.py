"""The settings of the two suites, `vbench` and `vbench-i2v`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from opensora.config import Config
from opensora.errors import did_you_mean
from opensora.evaluate.vbench.dimensions import names
from opensora.evaluate.vbench.prompts import READ_SAMPLES
from opensora.infer.pipeline import SamplingConfig


class UpstreamConfig(Config):
    """An installation of VBench's own package, for the dimensions that are not measured here."""

    python: str | None = Field(
        default=None,
        description="interpreter of an environment with the package vbench; by default this one, "
        "if it has the package",
    )
    folder: str | None = Field(
        default=None,
        description="a checkout of VBench, in which it is run; I2V finds its pictures there",
    )


class JudgingConfig(Config):
    """What is judged and with what; the part that both suites share."""

    dimensions: tuple[str, ...] = Field(
        default=(), description="which dimensions, all of them by default"
    )
    mode: Literal["standard", "custom"] = Field(
        default="standard",
        description="standard: VBench's prompts and file names; custom: a folder of any names, for "
        "dimensions that need no prompt",
    )
    prompts: str | None = Field(default=None, description="another prompt file in VBench's format")
    num_prompts: int | None = Field(
        default=None, ge=1, description="prompts for each dimension, for quick runs; all by default"
    )
    samples_per_prompt: int = Field(
        default=READ_SAMPLES, ge=1, le=READ_SAMPLES, description="videos of each prompt"
    )
    weights_dir: str | None = Field(
        default=None, description="folder of the weights that docs/vbench.md lists"
    )
    download: bool = Field(
        default=False, description="fetch DINO and CLIP from the Hugging Face hub if not there"
    )
    static_list: str | None = Field(
        default=None,
        description="JSON of the videos that passed a static filter, for temporal_flickering: a "
        "list of file names, or upstream's filtered_static_video.json",
    )
    proxies: bool = Field(default=True, description="also the proxy.* measures without weights")
    upstream: UpstreamConfig = UpstreamConfig()
    name: str = Field(
        default="vbench",
        pattern=r"^[\w.-]+$",
        description="of the result files, <name>_eval_results.json and <name>_full_info.json",
    )


class DrawingConfig(JudgingConfig):
    """How videos are drawn, where a model is given; the part that both suites share."""

    seed: int = Field(default=0, ge=0, lt=2**32, description="all seeds follow from it")
    sampling: SamplingConfig = SamplingConfig()
    negative_prompt: str = Field(default="", description="what guidance leads away from")
    batch_size: int = Field(default=8, ge=1, description="videos drawn at a time")


class VBenchConfig(DrawingConfig):
    """VBench v1, sixteen dimensions: the drawing, then the judging."""

    flicker_samples: int = Field(
        default=25,
        ge=1,
        le=100,
        description="videos of a prompt of temporal_flickering; its first five static ones count",
    )
    rewritten: str | None = Field(
        default=None,
        description="what the model is told in place of each prompt: a text with a line for each "
        "entry of the prompt file, such as VBench's all_dimension_longer.txt, or JSON "
        "{prompt: text}; files keep the names of the prompts",
    )

    @model_validator(mode="after")
    def _known(self) -> VBenchConfig:
        _check(self.dimensions, names("v1"))
        return self


class I2VConfig(DrawingConfig):
    """VBench-I2V: three dimensions of its own and seven shared ones."""

    pictures: str | None = Field(
        default=None,
        description="folder of the benchmark's pictures, from which a model's videos begin and "
        "with which i2v_subject compares",
    )

    @property
    def pictures_dir(self) -> Path | None:
        """`pictures` as a path."""
        return Path(self.pictures).expanduser() if self.pictures is not None else None

    @model_validator(mode="after")
    def _known(self) -> I2VConfig:
        _check(self.dimensions, names("i2v"))
        return self


DRAWING = frozenset({*DrawingConfig.model_fields, "rewritten"}) - frozenset(
    JudgingConfig.model_fields
)
"""Settings that mean nothing for finished videos."""


def _check(asked: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in asked:
        if name not in known:
            raise ValueError(f"dimension '{name}' is unknown.{did_you_mean(name, known)}")
    if len(set(asked)) != len(asked):
        raise ValueError("a dimension is named twice")
