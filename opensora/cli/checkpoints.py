"""Commands about what runs have written: verify, export."""

from __future__ import annotations

from pathlib import Path

import typer

from opensora.errors import CheckpointError, DataError, UsageError


def register(app: typer.Typer) -> None:
    """Add the commands of this file to the application."""
    for function in (verify, export):
        app.command()(function)


def verify(
    path: Path = typer.Argument(..., help="a run, a checkpoint, a latent cache, or a folder above"),
) -> None:
    """Digest everything again and name what is damaged, down to the tensor."""
    from opensora import store

    folders = sorted({file.parent for file in path.rglob(store.MANIFEST_NAME)})
    if not folders:
        raise UsageError(f"{path} has no {store.MANIFEST_NAME}: nothing in it was written to last")
    damaged = ""
    for folder in folders:
        try:
            problems = store.verify(folder)
            found = store.read_manifest(folder)
            detail = f"{len(found.files)} files, {_size(found)}"
        except DataError as error:
            problems, detail = [str(error)], ""
        state = "damaged" if problems else "sound"
        typer.echo(f"{state:8} {folder}  {'; '.join(problems) or detail}")
        damaged = damaged or (str(folder) if problems else "")
    if damaged:
        raise CheckpointError(
            f"{damaged} is damaged: copy it again from where it came, or remove it to go on from "
            "an earlier one"
        )


def _size(found) -> str:
    return f"{sum(record.size for record in found.files.values()) / 2**20:.1f} MiB"


def export(
    checkpoint: Path = typer.Argument(..., help="a run, or one of its checkpoints"),
    output: Path = typer.Argument(..., help="folder to write"),
    dtype: str = typer.Option("fp32", help="of the weights: fp32, bf16 or fp16"),
    raw: bool = typer.Option(False, "--raw", help="the last weights instead of their averages"),
) -> None:
    """Write the weights alone, whole, as safetensors: a tenth of a checkpoint, enough to sample."""
    from opensora.engine.export import export as write

    written = write(checkpoint, output, dtype=dtype, averaged=not raw)
    typer.echo(f"{written}")
