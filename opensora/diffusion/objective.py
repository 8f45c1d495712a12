"""The one table of processes: a config's `kind` -> the process that trains and samples with it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from opensora.diffusion.flow import Flow, FlowConfig
from opensora.diffusion.gaussian import DDPMConfig, EDMConfig, Gaussian
from opensora.diffusion.process import Process

ObjectiveConfig = Annotated[FlowConfig | DDPMConfig | EDMConfig, Field(discriminator="kind")]

PROCESSES = {"flow": Flow, "ddpm": Gaussian, "edm": Gaussian}


def build(config: FlowConfig | DDPMConfig | EDMConfig) -> Process:
    """The process that a config describes."""
    return PROCESSES[config.kind](config)
