"""Commands that run something: train, encode, report.

What can be refused without torch is refused before torch is imported, which takes seconds.
"""

from __future__ import annotations

from pathlib import Path

import typer

from opensora import config as configs
from opensora import interrupts
from opensora.cli.sample import sample
from opensora.errors import OpensoraError, UsageError

Overrides = typer.Argument(None, metavar="[KEY=VALUE]...", help="overrides, such as optim.lr=1e-3")


def register(app: typer.Typer) -> None:
    """Add the commands of this file to the application."""
    for function in (train, encode, sample):
        app.command()(function)
    app.command()(report)


def train(
    config: Path = typer.Argument(..., help="YAML file of the run, see configs/"),
    overrides: list[str] = Overrides,
) -> None:
    """Train what a config says, or go on where it stopped.

    Also under torchrun: torchrun --nproc-per-node N -m opensora train CONFIG.
    """
    tree = configs.override(configs.read(config), overrides or [])
    from opensora.train.config import TrainConfig

    loaded = configs.validate(TrainConfig, tree, where=str(config))
    from opensora.cli import evaluating
    from opensora.cli.sampling import sampler_for
    from opensora.runtime import start
    from opensora.train.run import train as run

    evaluating.check(loaded.evaluation)
    place = start(loaded.device, loaded.watchdog.collective_seconds)
    try:
        run(loaded, place, sampler=sampler_for, evaluator=evaluating.evaluator_for)
    except OpensoraError:
        interrupts.ignore()
        raise
    finally:
        place.close()


def encode(
    config: Path = typer.Argument(..., help="YAML file of an encoding, see configs/"),
    overrides: list[str] = Overrides,
) -> None:
    """Encode clips to cached latents, for quicker training."""
    tree = configs.override(configs.read(config), overrides or [])
    from opensora.cli.encoding import EncodeConfig, run

    run(configs.validate(EncodeConfig, tree, where=str(config)))


def report(
    folder: Path = typer.Argument(..., help="run folder, or a folder of runs and scores"),
    output: Path = typer.Option(None, "--output", "-o", help="page; FOLDER/report.html by default"),
    embed: float = typer.Option(
        25.0, min=0, metavar="MB", help="videos held by the page itself; others are linked"
    ),
) -> None:
    """Write one offline HTML page from what runs left on disk."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: name a run, or a folder of runs")
    from opensora.report.page import write_report

    typer.echo(write_report(folder, output, max_bytes=int(embed * 1e6)))
