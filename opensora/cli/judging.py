"""`opensora eval`: a suite on a checkpoint, or on a folder of videos."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from opensora import config as configs
from opensora import runtime, zoo
from opensora.cli.progress import Stages
from opensora.data.folder import SUFFIXES
from opensora.engine import checkpoint as checkpoints
from opensora.errors import CheckpointError, UsageError, did_you_mean
from opensora.evaluate import arena, fidelity, fvd, physics, validation_loss
from opensora.evaluate.suite import Autoencoder, Results, Subject, Suite, groups
from opensora.evaluate.vbench import suite as vbench
from opensora.infer.pipeline import Shape, VideoPipeline
from opensora.runtime import Runtime
from opensora.store import ASK_FOR
from opensora.train.text_to_video import load_vae

SUITES: dict[str, Suite] = {
    "arena": arena.SUITE,
    "vbench": vbench.SUITE,
    "vbench-i2v": vbench.I2V_SUITE,
    "fvd": fvd.SUITE,
    "physics": physics.SUITE,
    "vae": fidelity.SUITE,
    "loss": validation_loss.SUITE,
}


def run(
    path: Path,
    suite: str,
    settings: dict[str, Any],
    where: str,
    output: Path | None,
    device: str,
) -> None:
    """Run a suite and print its table.

    Args:
        path: of a checkpoint, or a folder of videos.
        settings: tree of the suite's config; `where` it came from.
    """
    if suite not in SUITES:
        raise UsageError(f"--suite {suite} is unknown.{did_you_mean(suite, SUITES)}")
    chosen = SUITES[suite]
    config = configs.validate(chosen.config, settings, where=where)
    with runtime.taking_part(device) as place:
        subject, beside = subject_of(path, place)
        output = output or beside / "eval" / suite
        with Stages(visible=place.is_main) as stages:
            results = chosen.run(subject, config, output, stages.update)
    if place.is_main:
        print_table(results, chosen.columns)
        print(output / "scores.json")


def subject_of(path: Path, place: Runtime) -> tuple[Subject, Path]:
    """What a user means by a path, and the folder beside which its scores belong.

    Raises:
        CheckpointError: neither a checkpoint nor a folder with videos.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: {ASK_FOR}, or a folder of videos")
    videos = path.is_dir() and any(f.suffix.lower() in SUFFIXES for f in path.iterdir())
    if videos and not checkpoints.committed(path / "checkpoints"):
        return Subject(videos=path, place=place), path
    folder = checkpoints.find(path)
    if checkpoints.read_config(folder)["task"].get("kind") == "autoencoder":
        return Subject(place=place, alone=_autoencoder(folder, place)), folder.parent.parent
    trained = VideoPipeline.from_pretrained(folder).to(place.device)
    return Subject(trained, fresh=partial(fresh, trained), place=place), folder.parent.parent


def _autoencoder(folder: Path, place: Runtime) -> Autoencoder:
    """The VAE of a checkpoint of its own training."""
    vae = load_vae(folder).to(place.device)
    shape = checkpoints.load(folder, parts=()).progress["shape"]
    return Autoencoder(vae, Shape(**shape), checkpoints.identity(vae.state_dict()))


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
    ).to(trained.device, trained.dtype)


def print_table(results: Results, columns: tuple[str, ...] = ()) -> None:
    """Means with their 95 % intervals, a row a group; columns that no group has are left out."""
    found = groups(results)
    present = dict.fromkeys(m for group in found.values() for m in group)
    metrics = [m for m in columns if m in present] or list(present)
    cells = {name: [_cell(group.get(m)) for m in metrics] for name, group in found.items()}
    widths = [
        max(18, len(metric), *(len(row[i]) for row in cells.values())) + 2
        for i, metric in enumerate(metrics)
    ]
    for name, row in {"": metrics, **cells}.items():
        print(f"{name:24}" + "".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)))


def _cell(value: dict[str, float] | None) -> str:
    if value is None:
        return "-"
    numbers = (value["mean"], value["low"], value["high"])
    small = 0 < abs(value["mean"]) < 0.1
    mean, low, high = (f"{x:.2g}" if small else f"{x:.2f}" for x in numbers)
    return f"{mean} [{low} {high}]"
