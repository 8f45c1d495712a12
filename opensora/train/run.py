"""Puts a training run together from its config: data, task, optimizers, engine, trainer."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable

import torch

from opensora import __version__, runtime, zoo
from opensora.data import sources
from opensora.engine.local import LocalEngine
from opensora.errors import UsageError
from opensora.runtime import Runtime, log
from opensora.train import optim
from opensora.train.autoencoder import Autoencoder, AutoencoderConfig
from opensora.train.config import TrainConfig
from opensora.train.tasks import Task
from opensora.train.text_to_video import TextToVideo, TextToVideoConfig, load_vae, resolve
from opensora.train.trainer import Sampler, Trainer


def train(
    config: TrainConfig,
    place: Runtime,
    *,
    sampler: Callable[[TrainConfig], Sampler] | None = None,
) -> None:
    """Run, or go on with, the training that a config describes.

    Args:
        place: this process's rank and device.
        sampler: makes the function that draws sample videos, when the config asks for them.

    Raises:
        OpensoraError: with the exit code of its kind.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    rates = measure(place)
    config = settle(config, place, rates)
    task = build_task(config).to(place.device)
    source = sources.open_source(config.data, needs_of(config, task), place, seed=config.seed)
    log.info("%s", source.census)
    optimizers = optim.build(config.optim, task)
    precision = torch.bfloat16 if config.precision == "bf16" else torch.float32
    engine = LocalEngine(place, precision=precision)
    engine.wrap(task, optimizers)
    if place.is_main:
        _write_facts(config, place, task, rates)
    trainer = Trainer(
        config,
        runtime=place,
        task=task,
        engine=engine,
        source=source,
        sampler=sampler(config) if sampler is not None and config.samples.every else None,
        matmul_rate=rates[config.precision] * place.world_size,
    )
    trainer.resume()
    trainer.run()


def measure(place: Runtime) -> dict[str, float]:
    """Matmul rate of this machine in FLOP/s by precision, the yardstick of throughput."""
    return {
        "fp32": runtime.matmul_rate(place.device, torch.float32),
        "bf16": runtime.matmul_rate(place.device, torch.bfloat16),
    }


def settle(config: TrainConfig, place: Runtime, rates: dict[str, float]) -> TrainConfig:
    """The config with every choice made that depends on the machine or on other runs."""
    changes: dict[str, object] = {}
    if config.precision == "auto":
        faster = torch.tensor([float(rates["bf16"] > 1.2 * rates["fp32"])])
        chosen = "bf16" if place.all_reduce(faster, "max").item() else "fp32"
        changes["precision"] = chosen
        log.info("precision %s: bf16 %.0f, fp32 %.0f GFLOP/s", chosen, *_giga(rates))
    if isinstance(config.task, TextToVideoConfig) and config.task.vae is None:
        changes["task"] = resolve(config.task)
    return config.model_copy(update=changes)


def _giga(rates: dict[str, float]) -> tuple[float, float]:
    return rates["bf16"] / 1e9, rates["fp32"] / 1e9


def build_task(config: TrainConfig) -> Task:
    """The task with freshly initialised weights, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(runtime.address(config.seed, "weights"))
        if isinstance(config.task, AutoencoderConfig):
            return Autoencoder(config.task, seed=config.seed)
        text = zoo.build_text(config.task.text)
        if config.task.vae_from is None:
            raise UsageError("task.vae_from is not set: name the run or checkpoint of a VAE")
        vae = load_vae(config.task.vae_from)
        return TextToVideo(config.task, vae=vae, text=text, seed=config.seed)


def needs_of(config: TrainConfig, task: Task) -> sources.Needs:
    """What a task asks of its data: how clips must divide, and which latents it takes."""
    if isinstance(task, TextToVideo):
        latents = task.latent_identity() if config.data.kind == "latents" else None
        return sources.Needs(task.vae.stride, task.config.model.patch, latents)
    assert isinstance(task, Autoencoder)
    if config.data.kind == "latents":
        raise UsageError("task autoencoder trains on clips: set data.kind=clips and a manifest")
    return sources.Needs(task.vae.stride, (1, 1, 1), None)


def _write_facts(config: TrainConfig, place: Runtime, task: Task, rates: dict[str, float]) -> None:
    """config.json and environment.json in the run folder, for people and the report."""
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "config.json").write_text(config.json_text(), encoding="utf-8")
    facts = {
        "opensora": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": runtime.processor_name(),
        "device": str(place.device),
        "world_size": place.world_size,
        "threads": torch.get_num_threads(),
        "matmul_flops_per_second": rates,
        "parameters": sum(p.numel() for p in task.parameters() if p.requires_grad),
    }
    path = config.output / "environment.json"
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
