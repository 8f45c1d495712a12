"""The parts of a pipeline from a checkpoint of text-to-video training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opensora import zoo
from opensora.engine import checkpoint
from opensora.engine.interface import load_weights
from opensora.errors import CheckpointError
from opensora.infer.settings import Shape
from opensora.zoo import GeneratorConfig


def parts(path: str | Path, *, averaged: bool) -> dict[str, Any]:
    """The arguments of `VideoPipeline`; see its `from_pretrained`."""
    folder = checkpoint.find(path)
    tree = checkpoint.read_config(folder)["task"]
    if tree.get("kind") != "text_to_video":
        raise CheckpointError(
            f"{folder} is a checkpoint of '{tree.get('kind')}'; sampling needs 'text_to_video'"
        )
    parts = ("weights", "ema", "frozen") if averaged else ("weights", "frozen")
    snapshot = checkpoint.load(folder, parts=parts)
    known = {k: v for k, v in tree.items() if k in GeneratorConfig.model_fields}
    config = checkpoint.part_of_config(GeneratorConfig, known, folder)
    assert config.vae is not None, "a checkpoint's config is resolved"
    vae = zoo.build_vae(config.vae)
    text = zoo.build_text(config.text)
    model = zoo.build_denoiser(config.model, vae=vae, text=text)
    weights = checkpoint.inference_weights(snapshot, averaged=averaged)
    load_weights(vae, checkpoint.prefixed(snapshot.frozen, "vae"))
    load_weights(model, checkpoint.prefixed(weights, "model"))
    if text.trainable:
        load_weights(text, checkpoint.prefixed(weights, "text"))
    return {
        "model": model.eval(),
        "text": text.eval(),
        "vae": vae.eval(),
        "config": config,
        "shape": Shape(**snapshot.progress["shape"]),
        "fingerprint": checkpoint.identity({**weights, **snapshot.frozen}),
    }
