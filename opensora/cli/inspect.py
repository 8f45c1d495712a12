"""Commands that look and change nothing: config show, config schema, doctor, plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from opensora import config as configs
from opensora.config import Config
from opensora.errors import UsageError, did_you_mean

config_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    """Add `doctor` and `plan` to the application."""
    app.command()(doctor)
    app.command()(plan)


def schemas() -> dict[str, type[Config]]:
    """What kinds of config files there are."""
    from opensora.arena.scenes import SceneConfig
    from opensora.cli.encoding import EncodeConfig
    from opensora.evaluate.arena import ArenaConfig
    from opensora.train.config import TrainConfig

    return {
        "train": TrainConfig,
        "encode": EncodeConfig,
        "arena": ArenaConfig,
        "scenes": SceneConfig,
    }


def kind_of(tree: dict[str, Any]) -> str:
    """The kind of config that a tree is: the one with most of its keys."""
    return max(schemas().items(), key=lambda item: len(tree.keys() & item[1].model_fields.keys()))[
        0
    ]


def _schema(kind: str) -> type[Config]:
    known = schemas()
    if kind not in known:
        raise UsageError(f"--kind {kind} is unknown.{did_you_mean(kind, known)}")
    return known[kind]


@config_app.command()
def show(
    path: Path = typer.Argument(..., help="YAML file"),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]..."),
    kind: str = typer.Option(None, help="train, encode, arena or scenes; by default as its keys"),
) -> None:
    """Print a config with every default written out, as JSON."""
    tree = configs.override(configs.read(path), overrides or [])
    schema = _schema(kind or kind_of(tree))
    typer.echo(configs.to_json(configs.validate(schema, tree, where=str(path))), nl=False)


@config_app.command()
def schema(kind: str = typer.Option("train", help="train, encode, arena or scenes")) -> None:
    """Print the JSON schema of a kind of config, for editors."""
    typer.echo(json.dumps(_schema(kind).model_json_schema(), indent=1))


def doctor(
    folder: Path = typer.Option(Path(), help="where runs will be written"),
) -> None:
    """Check versions, devices, codecs, collectives and disk."""
    from opensora.cli.doctor import examine

    findings = examine(folder)
    for finding in findings:
        typer.echo(finding.line())
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(64)


def plan(
    config: Path = typer.Argument(..., help="YAML file of a training run; or a run, to --sample"),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]..."),
    sample: bool = typer.Option(False, "--sample", help="plan drawing videos rather than training"),
    frames: int = typer.Option(None, min=1, help="of a video to sample; as trained by default"),
    height: int = typer.Option(None, min=8, help="pixels"),
    width: int = typer.Option(None, min=8, help="pixels"),
    steps: int = typer.Option(30, min=1, help="sampling steps"),
    batch: int = typer.Option(1, min=1, help="videos drawn at a time"),
    gpus: int = typer.Option(1, min=1, help="devices"),
    gpu: str = typer.Option("h200", help="their kind, such as h200, h100, a100-80, rtx4090"),
    rate: float = typer.Option(
        None, min=0.001, metavar="TFLOPS", help="TFLOP/s that a device sustains, when measured"
    ),
    price: float = typer.Option(None, min=0, help="of a device an hour, in any currency"),
) -> None:
    """Say before a launch what a run takes: parameters, FLOPs, memory, time, money.

    Runs on any machine in half a minute. What does not fit is refused with changes that would.
    """
    if sample:
        from opensora.cli.sample_planning import plan as drawing

        size = (frames, height, width)
        drawing(
            config, overrides or [], size=size, steps=steps, batch=batch, gpu=gpu, teraflops=rate
        )
        return
    tree = configs.override(configs.read(config), overrides or [])
    from opensora.train.config import TrainConfig

    loaded = configs.validate(TrainConfig, tree, where=str(config))
    from opensora.cli.planning import plan as run

    run(loaded, ranks=gpus, gpu=gpu, teraflops=rate, price=price)
