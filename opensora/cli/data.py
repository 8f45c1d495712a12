"""`opensora data`: render scenes, probe folders, check manifests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from opensora import config as configs
from opensora.errors import DataError, UsageError, did_you_mean

if TYPE_CHECKING:
    from opensora.data.manifest import Manifest

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command()
def render(
    output: Path = typer.Argument(..., help="folder of the dataset"),
    count: int = typer.Option(1000, min=1, help="clips; a larger count extends a dataset"),
    split: str = typer.Option("train", help="train, heldout (unseen colour-shape pairs) or fast"),
    seed: int = typer.Option(0, min=0),
    workers: int = typer.Option(0, min=0, help="processes"),
    config: Path = typer.Option(None, "--config", help="YAML with the distribution of scenes"),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]..."),
) -> None:
    """Render captioned scenes with exact ground truth.

    Writes mp4 files, manifest.csv and truth.jsonl.
    """
    from opensora.arena.dataset import write_dataset
    from opensora.arena.scenes import SPLITS, SceneConfig
    from opensora.cli.progress import Stages

    if split not in SPLITS:
        raise UsageError(f"--split {split} is unknown.{did_you_mean(split, SPLITS)}")
    tree = {} if config is None else configs.read(config)
    tree = configs.override(tree, overrides or [])
    scenes = configs.validate(SceneConfig, tree, where=str(config or "render"))
    with Stages() as stages:
        path = write_dataset(
            output,
            scenes,
            seed=seed,
            count=count,
            split=split,
            workers=workers,
            progress=lambda done, total: stages.update(f"rendering {split}", done, total),
        )
    typer.echo(path)


@app.command()
def probe(
    source: Path = typer.Argument(..., help="folder of videos, or a manifest with gaps to fill"),
    output: Path = typer.Option(Path("manifest.csv"), "--output", "-o", help=".csv or .parquet"),
    captions: Path = typer.Option(None, help="CSV or Parquet with path and text"),
    decode: bool = typer.Option(False, help="decode every frame, which finds all damage"),
) -> None:
    """Build a manifest from a folder of videos.

    Files that cannot be read are listed with their reason. Captions come from --captions, from a
    .txt beside the video, or from the file's name.
    """
    from opensora.cli.progress import Stages
    from opensora.data import folder, manifest

    with Stages() as stages:
        options = folder.ProbeOptions(
            count="decode" if decode else "packets",
            progress=lambda done, total: stages.update("probing", done, total),
        )
        if source.is_dir():
            found, refused = folder.probe_folder(source, captions=captions, options=options)
        elif captions is not None:
            raise UsageError("--captions goes with a folder; a manifest has its own texts")
        else:
            found, refused = folder.fill(source, options=options)
    manifest.write(_anchored(found, output.absolute().parent), output)
    typer.echo(f"{len(found)} clips in {output}")
    if refused:
        quarantine = output.with_name(f"{output.stem}.quarantine.csv")
        folder.write_refused(refused, quarantine)
        typer.echo(f"{len(refused)} files refused, see {quarantine}")


def _anchored(rows: Manifest, folder: Path) -> Manifest:
    """The same clips in a manifest of another folder.

    Paths below that folder stay relative, so that both can be moved together; others become
    absolute.
    """
    from opensora.data.packed import PackedStrings

    def place(row: int) -> str:
        path = rows.location(row).absolute()
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)

    paths = PackedStrings.pack(place(row) for row in range(len(rows)))
    return replace(rows, folder=folder, paths=paths)


@app.command()
def check(
    manifest: Path = typer.Argument(..., help="CSV or Parquet"),
    config: Path = typer.Option(None, "--config", help="training YAML, to show what it would use"),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]..."),
) -> None:
    """Check a manifest and its files.

    With --config, say which clips training would leave out.
    """
    from opensora.data import manifest as manifests

    rows = manifests.read(manifest)
    count = manifests.check_files(rows, at_most=len(rows))
    typer.echo(f"{manifest}: {len(rows)} rows, {count} files present")
    if config is None:
        return
    from opensora.data.assignment import BucketAssigner
    from opensora.train.config import TrainConfig
    from opensora.train.run import build_task, needs_of

    loaded = configs.load(TrainConfig, config, overrides or [])
    if loaded.data.kind != "clips":
        raise DataError(f"{config} reads a cache, not a manifest; check the encode config instead")
    needs = needs_of(loaded, build_task(loaded))
    assigner = BucketAssigner(
        rows, loaded.data.buckets, stride=needs.stride, patch=needs.patch, seed=loaded.seed
    )
    typer.echo(str(assigner(0).census))
