"""Puts a training run together from its config: data, task, optimizers, engine, trainer."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from opensora import __version__, runtime, zoo
from opensora.data import sources
from opensora.data.latents import open_cache
from opensora.data.plan import PartOf, whole
from opensora.disk import preflight, replace_file
from opensora.dist.mesh import Mesh
from opensora.dist.mesh import resolve as resolve_layout
from opensora.engine import checkpoint, compiling, engines, recompute, sequence, tensor
from opensora.engine.compiling import CompileChoice
from opensora.engine.sequence import SequenceParallel
from opensora.errors import UsageError
from opensora.ops import selection
from opensora.ops.attention import block_for
from opensora.peers import ending_alike
from opensora.runtime import Runtime, log
from opensora.train import optim
from opensora.train.autoencoder import Autoencoder, AutoencoderConfig
from opensora.train.config import TrainConfig
from opensora.train.cost import clip_cost
from opensora.train.signals import Requests, listening
from opensora.train.tasks import Task
from opensora.train.text_to_video import TextToVideo, TextToVideoConfig, load_vae, resolve
from opensora.train.trainer import Evaluator, Sampler, Trainer
from opensora.vae.causal import CausalVAEConfig
from opensora.watchdog import Watchdog, watching


def train(
    config: TrainConfig,
    place: Runtime,
    *,
    sampler: Callable[[TrainConfig], Sampler] | None = None,
    evaluator: Callable[[TrainConfig], Evaluator] | None = None,
) -> None:
    """Run, or go on with, the training that a config describes.

    Args:
        place: this process's rank and device.
        sampler: makes the function that draws sample videos, when the config asks for them.
        evaluator: makes the one that judges, likewise.

    Raises:
        OpensoraError: with the exit code of its kind.
    """
    with (
        listening() as requests,
        watching(config.watchdog, place.peers, config.output) as watchdog,
        ending_alike(place.peers),
    ):
        trainer = prepare(
            config,
            place,
            requests=requests,
            sampler=sampler,
            evaluator=evaluator,
            watchdog=watchdog,
        )
        trainer.run()


def prepare(
    config: TrainConfig,
    place: Runtime,
    *,
    requests: Requests | None = None,
    sampler: Callable[[TrainConfig], Sampler] | None = None,
    evaluator: Callable[[TrainConfig], Evaluator] | None = None,
    watchdog: Watchdog | None = None,
) -> Trainer:
    """The trainer of a config, where the last attempt stopped; the arguments are those of `train`.

    Args:
        requests: what signals ask for.
        watchdog: is told how far the run is.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    engines.find(config.engine, place.device)
    rates = measure(place)
    config = settle(config, place, rates)
    deferred = engines.fills(config.engine) and place.world_size > 1
    task = build_task(config, deferred=deferred).to(place.device)
    work = share_work(config, task, place)
    select_attention(config, task, place, work)
    source = sources.open_source(
        config.data,
        needs_of(config, task, work),
        seed=config.seed,
        quarantine=config.output / "quarantine.csv",
    )
    log.info("%s", source.census)
    if isinstance(task, TextToVideo):
        compiled = {"compile_blocks": compiling.apply} if config.compile == "always" else {}
        recompute.apply(task.model, config.recompute, **compiled)
    precision = torch.bfloat16 if config.precision == "bf16" else torch.float32
    engine = engines.build(config.engine, place, work.mesh, precision=precision, recipe=task.recipe)
    engine.wrap(task, partial(optim.build, config.optim))
    trainer = Trainer(
        config,
        runtime=place,
        task=task,
        engine=engine,
        source=source,
        requests=requests,
        sampler=sampler(config) if sampler is not None and config.samples.every else None,
        evaluator=evaluator(config) if evaluator is not None and config.evaluation.every else None,
        matmul_rate=rates[config.precision] * place.world_size,
        watchdog=watchdog,
    )
    if place.is_main:
        preflight(config.output, num_bytes=_bytes_to_save(task))
    trainer.state.resume()
    if place.is_main:
        _write_facts(config, place, task, rates)
    return trainer


def select_attention(config: TrainConfig, task: Task, place: Runtime, work: Share) -> None:
    """Choose and try what computes attention, and say so in one line.

    Raises:
        UsageError: the config asks for a backend, or to keep its results, that this machine or
            model does not allow.
    """
    if not isinstance(task, TextToVideo):
        return
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    head_dim = task.config.model.width // task.config.model.num_heads
    chosen = selection.select(config.attention, place.device, dtype, head_dim)
    recompute.check(config.recompute, chosen)
    shared = chosen.self_attention
    if work.mesh is not None and work.mesh.layout.ring > 1:
        shared = type(block_for(place.device, dtype, head_dim)).__name__
    log.info("attention: %s, %s for attention shared by ranks", chosen, shared)


def measure(place: Runtime) -> dict[str, float]:
    """Matmul rate of this machine in FLOP/s by precision, the yardstick of throughput."""
    return {
        "fp32": runtime.matmul_rate(place.device, torch.float32),
        "bf16": runtime.matmul_rate(place.device, torch.bfloat16),
    }


def settle(config: TrainConfig, place: Runtime, rates: dict[str, float]) -> TrainConfig:
    """The config with every choice made that depends on the machine or on other runs."""
    changes: dict[str, object] = {"compile": _compile(config, place)}
    if config.precision == "auto":
        changes["precision"] = _precision(config, place, rates)
    if isinstance(config.task, TextToVideoConfig):
        synthetic = config.data.kind == "synthetic" and config.task.vae_from is None
        changes["task"] = (
            config.task.model_copy(update={"vae": config.task.vae or CausalVAEConfig()})
            if synthetic
            else resolve(config.task)
        )
    return config.model_copy(update=changes)


def _precision(config: TrainConfig, place: Runtime, rates: dict[str, float]) -> str:
    """The precision that the run began with; for a new run the faster one."""
    begun = checkpoint.committed(config.output / "checkpoints")
    if begun:
        return checkpoint.read_config(begun[-1])["precision"]
    faster = torch.tensor([float(rates["bf16"] > 1.2 * rates["fp32"])])
    chosen = "bf16" if place.all_reduce(faster, "max").item() else "fp32"
    log.info("precision %s: bf16 %.0f, fp32 %.0f GFLOP/s", chosen, *_giga(rates))
    return chosen


def _compile(config: TrainConfig, place: Runtime) -> CompileChoice:
    """Whether to compile: as the run began, for a new run where every rank can."""
    able = engines.compiles(config.engine) and config.parallel.tp == 1
    if config.task.kind == "autoencoder" or not able:
        return "never"
    if config.compile == "auto" and (begun := checkpoint.committed(config.output / "checkpoints")):
        return checkpoint.read_config(begun[-1]).get("compile", "never")
    able = all(place.gather_objects(compiling.choose(config.compile, place.device)))
    return "always" if able else "never"


def _giga(rates: dict[str, float]) -> tuple[float, float]:
    return rates["bf16"] / 1e9, rates["fp32"] / 1e9


def build_task(config: TrainConfig, *, deferred: bool = False) -> Task:
    """The task with freshly initialised weights, the same on every rank.

    Args:
        deferred: leave the weights of a denoiser to the engine (`Task.recipe`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(runtime.address(config.seed, "weights"))
        if isinstance(config.task, AutoencoderConfig):
            whole = config.micro_batch is None
            return Autoencoder(config.task, seed=config.seed, whole_batch=whole)
        text = zoo.build_text(config.task.text)
        if config.task.vae_from is not None:
            vae = load_vae(config.task.vae_from)
        elif config.data.kind == "synthetic":
            vae = zoo.build_vae(config.task.vae or CausalVAEConfig()).requires_grad_(False)
        else:
            raise UsageError("task.vae_from is not set: name the run or checkpoint of a VAE")
        return TextToVideo(config.task, vae=vae, text=text, seed=config.seed, deferred=deferred)


@dataclass(frozen=True)
class Share:
    """This rank's share of the work.

    Attributes:
        mesh: how the ranks are laid out; None on one rank.
        training: which part of a bucket's batches it reads.
        validation: (index, count), which of the validation batches.
    """

    mesh: Mesh | None = None
    training: PartOf = whole
    validation: tuple[int, int] = (0, 1)


ALONE = Share()


def share_work(config: TrainConfig, task: Task, place: Runtime) -> Share:
    """Lay the ranks out as the config says, tell the task, and say what this rank reads.

    Raises:
        UsageError: the axes do not fit the ranks, or the model cannot be shared so.
    """
    sharded = engines.shards(config.engine)
    layout = resolve_layout(config.parallel, place.world_size, shards=sharded)
    if not isinstance(task, TextToVideo) and (sharded or layout.sequence * layout.tp > 1):
        raise UsageError(
            f"task {config.task.kind} trains whole on every rank: set engine.kind=local and leave "
            "out parallel.ring, ulysses, tp"
        )
    if place.world_size == 1:
        return ALONE
    ranks = Mesh(layout, place.rank, place.device.type)
    shared = SequenceParallel(ranks, config.parallel.max_tokens)
    if isinstance(task, TextToVideo):
        sequence.check(task.model, layout)
        tensor.apply(task.model, ranks)
        task.sequence = shared
    return Share(
        ranks, lambda bucket: ranks.part(shared.degree(bucket.num_tokens)), ranks.part(shared.most)
    )


def needs_of(config: TrainConfig, task: Task, work: Share = ALONE) -> sources.Needs:
    """What a task asks of its data: how clips must divide, and which latents it takes."""
    shares = (work.training, work.validation)
    if not isinstance(task, TextToVideo):
        assert isinstance(task, Autoencoder)
        return sources.Needs(task.vae.stride, (1, 1, 1), task.vae.latent_channels, None, *shares)
    identity = None
    if isinstance(config.data, sources.LatentsSourceConfig):
        identity = task.latent_identity(open_cache(config.data.cache).identity)
    patch, channels = task.config.model.patch, task.vae.latent_channels
    cost = clip_cost(config) if config.data.mix == "clips" else sources.tokens
    return sources.Needs(task.vae.stride, patch, channels, identity, *shares, cost)


def _bytes_to_save(task: Task) -> int:
    """Room for two checkpoints: float32 weights, averages and two moments, and frozen weights."""
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    frozen = sum(value.nbytes for value in task.frozen().values())
    return 2 * (16 * trained + frozen)


def _write_facts(config: TrainConfig, place: Runtime, task: Task, rates: dict[str, float]) -> None:
    """config.json and environment.json in the run folder, for people and the report."""
    replace_file(config.output / "config.json", config.json_text().encode())
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
    text = json.dumps(facts, indent=1) + "\n"
    replace_file(config.output / "environment.json", text.encode())
