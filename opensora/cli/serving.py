"""`opensora serve`: options to a config, a checkpoint to pipelines, and the service on them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

import typer

from opensora.errors import UsageError, did_you_mean


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(serve)


def serve(
    checkpoint: Path = typer.Argument(..., help="run, checkpoints folder or checkpoint"),
    host: str = typer.Option("127.0.0.1", help="address; others than this machine's need a token"),
    port: int = typer.Option(8000, min=0, max=65535, help="0 takes a free one"),
    output: Path = typer.Option(Path("outputs/serve"), "--output", "-o", help="folder of jobs"),
    token_file: Path = typer.Option(None, help="file with the token; or OPENSORA_SERVE_TOKEN"),
    queue: int = typer.Option(8, min=1, max=10_000, help="jobs that may wait"),
    keep: int = typer.Option(200, min=1, help="finished jobs kept"),
    settings: list[str] = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="any key of the service's config, e.g. max_steps"
    ),
    raw_weights: bool = typer.Option(False, help="the last weights rather than their average"),
    device: list[str] = typer.Option(["auto"], help="auto, cpu, cuda:0 ...; again for more"),
    attention: str = typer.Option("auto", help="auto, or a backend that `opensora doctor` finds"),
) -> None:
    """Serve a checkpoint over HTTP: /v1/videos, and a page at /.

    Ends on SIGTERM or Ctrl-C with 0, or with 75 when jobs wait for the next start.
    """
    from opensora import config as configs
    from opensora.ops.backends import AttentionChoice
    from opensora.serve.config import ServeConfig, read_token

    if attention not in (choices := get_args(AttentionChoice)):
        raise UsageError(f"--attention {attention} is unknown.{did_you_mean(attention, choices)}")
    tree: dict[str, Any] = {"host": host, "port": port, "output": str(output)}
    tree |= {"queue": queue, "keep": keep}
    config = configs.validate(
        ServeConfig, configs.override(tree, settings or []), where="serve --set"
    )
    token = read_token(token_file)
    config.check_exposure(token)
    raise typer.Exit(_run(checkpoint, config, token, list(device), attention, not raw_weights))


def _run(
    checkpoint: Path, config: Any, token: str | None, devices: list[str], attention: str,
    averaged: bool,
) -> int:  # fmt: skip
    from opensora import runtime
    from opensora.infer.pipeline import VideoPipeline
    from opensora.ops.selection import select
    from opensora.serve import server
    from opensora.serve.api import Service
    from opensora.serve.jobs import Store

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    opened = server.listen(config)
    store = None
    try:
        store = Store.open(config.output, keep=config.keep)
        pipelines = []
        for name in devices:
            place = runtime.pick_device(name)
            pipeline = VideoPipeline.from_pretrained(checkpoint, averaged=averaged).to(place)
            model = pipeline.config.model
            select(attention, place, pipeline.dtype, model.width // model.num_heads)
            pipelines.append(pipeline)
        name = checkpoint.resolve().name or "model"
        service = Service(config, pipelines, store, str(checkpoint), name)
        print(f"serving {checkpoint} at {server.address(opened)}", flush=True)
        return server.run(service, opened, token=token)
    finally:
        opened.close()
        if store is not None:
            store.close()
