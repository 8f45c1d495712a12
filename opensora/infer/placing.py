"""A pipeline onto a device, with what is done for less memory: `SavingsConfig` says what."""

from __future__ import annotations

import torch

from opensora.infer.offload import BlockStream, visit
from opensora.infer.pipeline import VideoPipeline
from opensora.infer.quantize import quantize
from opensora.infer.savings import SavingsConfig


def place(pipeline: VideoPipeline, config: SavingsConfig, device: str | torch.device) -> None:
    """Put a pipeline from the CPU onto a device, in the place of `pipeline.to`.

    Its fingerprint says how weights were rounded, so that samples are not taken for others.
    """
    if config.quantize != "none":
        quantize(pipeline.model, config.quantize)
        pipeline.fingerprint = f"{pipeline.fingerprint} {config.quantize}".strip()
    pipeline.savings = config
    if config.offload:
        stream_blocks(pipeline, device, ahead=config.ahead)
    else:
        pipeline.to(device)


def stream_blocks(
    pipeline: VideoPipeline, device: str | torch.device, *, ahead: int = 1
) -> BlockStream:
    """Let a pipeline draw on a device that its weights do not fit; instead of `pipeline.to`.

    Args:
        pipeline: on the CPU.
        ahead: blocks of the denoiser that are fetched before they are needed.
    """
    pipeline.device = torch.device(device)
    visit(pipeline.text, "encode", pipeline.device)
    for method in ("encode", "reconstruct"):
        visit(pipeline.vae, method, pipeline.device)
    return BlockStream(pipeline.model, pipeline.device, ahead=ahead)
