"""`opensora eval`: a suite on a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from opensora import config as configs
from opensora import runtime, zoo
from opensora.cli.progress import Stages
from opensora.engine import checkpoint as checkpoints
from opensora.errors import UsageError, did_you_mean
from opensora.evaluate import arena
from opensora.infer.pipeline import VideoPipeline

SUITES = ("arena",)


def run(
    checkpoint: Path,
    suite: str,
    settings: dict[str, Any],
    where: str,
    output: Path | None,
    device: str,
) -> None:
    """Run a suite and print its table."""
    if suite not in SUITES:
        raise UsageError(f"--suite {suite} is unknown.{did_you_mean(suite, SUITES)}")
    config = configs.validate(arena.ArenaConfig, settings, where=where)
    place = runtime.start(device)
    if place.world_size > 1:
        place.close()
        raise UsageError("eval runs in one process: call it without torchrun")
    folder = checkpoints.find(checkpoint)
    trained = VideoPipeline.from_pretrained(folder).to(place.device)
    untrained = fresh(trained).to(place.device)
    output = output or folder.parent.parent / "eval" / suite
    with Stages() as stages:
        scores = arena.run(trained, untrained, config, output, progress=stages.update)
    print_table(scores)
    print(output / "scores.json")


def fresh(trained: VideoPipeline) -> VideoPipeline:
    """The same architecture and VAE with weights as they were before training."""
    config = trained.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(runtime.address(0, "untrained"))
        text = zoo.build_text(config.text) if trained.text.trainable else trained.text
        model = zoo.build_denoiser(config.model, vae=trained.vae, text=text)
    return VideoPipeline(
        model=model.eval(),
        text=text.eval(),
        vae=trained.vae,
        config=config,
        shape=trained.shape,
        fingerprint="untrained",
    )


def print_table(scores: dict[str, Any]) -> None:
    """Means with their 95 % intervals, a row a group."""
    metrics = ("colour", "direction", "count", "shape", "binding", "success", "psnr")
    groups = [name for name in scores if name not in ("targets", "settings")]
    print(f"{'':24}" + "".join(f"{metric:>20}" for metric in metrics))
    for group in groups:
        cells = []
        for metric in metrics:
            value = scores[group].get(metric)
            text = f"{value['mean']:.2f} [{value['low']:.2f} {value['high']:.2f}]" if value else "-"
            cells.append(f"{text:>20}")
        print(f"{group:24}" + "".join(cells))
