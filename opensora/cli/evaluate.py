"""`opensora eval`: judge a checkpoint, compare two of them, tabulate many.

`opensora eval CHECKPOINT` is `opensora eval run CHECKPOINT`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from opensora import config as configs
from opensora.errors import UsageError, did_you_mean

DEFAULT = "run"


class WithDefault(TyperGroup):
    """A group that runs `run` where the first word is none of its commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=WithDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    subcommand_metavar="CHECKPOINT [OPTIONS] [KEY=VALUE]... | COMMAND",
)


@app.command(DEFAULT)
def run(
    checkpoint: Path = typer.Argument(
        ..., help="run, checkpoints folder or checkpoint; or a folder of videos"
    ),
    suite: str = typer.Option(
        "arena", help="what to measure: arena, vbench, vbench-i2v, fvd, vae, loss, physics"
    ),
    output: Path = typer.Option(None, "--output", "-o", help="folder; beside the run by default"),
    config: Path = typer.Option(None, "--config", help="YAML with the suite's settings"),
    overrides: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="settings of the suite, such as seed=2"
    ),
    device: str = typer.Option("auto", help="auto, cpu, cuda, mps"),
) -> None:
    """Judge a checkpoint beside its controls. This is the command where none is named."""
    tree: dict[str, Any] = {} if config is None else configs.read(config)
    tree = configs.override(tree, overrides or [])
    from opensora.cli.judging import run as judge

    judge(checkpoint, suite, tree, str(config or "eval"), output, device)


@app.command()
def compare(
    first: Path = typer.Argument(..., metavar="A", help="folder of scores, or a run that has some"),
    second: Path = typer.Argument(..., metavar="B", help="the same of the other checkpoint"),
    suite: str = typer.Option(None, help="which scores, where a run has those of several suites"),
    json: bool = typer.Option(False, "--json", help="print JSON"),
) -> None:
    """Compare two results sample by sample: difference, 95 % interval, p-value, verdict."""
    from opensora.evaluate import compare as comparing
    from opensora.evaluate import results

    a, b = results.only(first, suite), results.only(second, suite)
    differences = comparing.compare(a, b)
    typer.echo((comparing.as_json if json else comparing.text)(a, b, differences))


@app.command()
def tabulate(
    folders: list[Path] = typer.Argument(..., help="runs, or folders that hold scores"),
    suite: str = typer.Option(None, help="only the scores of this suite"),
    metric: list[str] = typer.Option(None, "--metric", help="only this column; may be repeated"),
    controls: bool = typer.Option(False, "--controls", help="the control groups as well"),
    format: str = typer.Option("text", help="text, markdown or json"),
) -> None:
    """One row a checkpoint, out of the scores that evaluations left on disk."""
    from opensora.evaluate import table

    if format not in table.FORMATS:
        raise UsageError(f"--format {format} is unknown.{did_you_mean(format, table.FORMATS)}")
    found = table.tabulate(folders, suite=suite, metrics=metric or (), controls=controls)
    typer.echo(table.FORMATS[format](found))
