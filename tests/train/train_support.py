"""Small runs without files: the tiny configs on clips that are rendered in memory, and a toy task.

Shared by the tests of this folder and by `ranks.py`, which several processes run together.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opensora import config as configs
from opensora import runtime, zoo
from opensora.arena.draw import render
from opensora.arena.scenes import SceneConfig, sample
from opensora.data.buckets import Bucket
from opensora.engine import checkpoint, engines, recompute
from opensora.runtime import Runtime
from opensora.train import optim
from opensora.train.autoencoder import AutoencoderConfig
from opensora.train.config import TrainConfig
from opensora.train.run import Share, build_task, share_work
from opensora.train.tasks import StepLoss, Sums, Task
from opensora.train.text_to_video import TextToVideo, TextToVideoConfig
from opensora.train.tracking import read_records
from opensora.train.trainer import Trainer
from opensora.types import LatentBatch, VideoBatch

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny"
ALONE = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
SCENES = SceneConfig(height=32, width=32, frames=5, num_objects={1: 1.0})
NUM_CLIPS = 12


def tiny(name: str, output: Path, *overrides: str) -> TrainConfig:
    """A tiny training config, quiet, writing to `output`."""
    quiet = ("log.bar=false", "device=cpu", f'output="{output}"')
    path = ROOT / "configs/mmdit/tiny.yaml" if name == "mmdit" else TINY / f"{name}.yaml"
    return configs.load(TrainConfig, path, [*quiet, *overrides])


def rows_of(step: int, batch_size: int) -> list[int]:
    """The rows of a step over all ranks."""
    order = np.argsort(runtime.fractions(np.arange(NUM_CLIPS), 0, "order", step))
    return order[:batch_size].tolist()


class MemorySource:
    """Batches of rows 0 .. NUM_CLIPS - 1 without files; the counterpart of `data.sources.Source`.

    Step s takes rows in an order that is addressed by s, and a rank its slice, as a plan does.

    Args:
        collate: (rows, step) -> batch; step is None in validation.
        batch_size: over all ranks.
        validation_sizes: sizes of the validation batches; none by default.

    Attributes:
        seen: (step, rows) of every training batch that was handed out.
        share: what this rank reads.
    """

    identity = "memory"
    bucket = Bucket("32px", 5, 32, 32, 6, 8)

    def __init__(
        self,
        collate: Callable[[list[int], int | None], Any],
        place: Runtime,
        *,
        batch_size: int,
        validation_sizes: tuple[int, ...] = (),
    ):
        self.collate, self.place, self.batch_size = collate, place, batch_size
        self.validation_sizes = validation_sizes
        self.has_validation = bool(validation_sizes)
        self.seen: list[tuple[int, list[int]]] = []
        self.share = Share()

    def train(self, first_step: int) -> Iterator[Any]:
        size, step = self.batch_size, first_step
        rank, ranks = self.share.training(self.bucket)
        while True:
            rows = rows_of(step, size)[rank * size // ranks : (rank + 1) * size // ranks]
            self.seen.append((step, rows))
            yield self.collate(rows, step)
            step += 1

    def validation(self) -> Iterator[Any]:
        edges = np.cumsum([0, *self.validation_sizes])
        batches = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
        index, count = self.share.validation
        for rows in batches[index::count]:
            yield self.collate(rows, None)


def clips(rows: list[int], step: int | None = None) -> VideoBatch:
    """Rendered scenes of 5x32x32 with their captions."""
    scenes = [sample(SCENES, 0, row) for row in rows]
    pixels = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
    return VideoBatch(
        pixels=pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1,
        texts=tuple(scene.caption for scene in scenes),
        sample_ids=torch.tensor(rows),
        fps=torch.full((len(rows),), 8.0),
    )


def latents(rows: list[int], step: int | None = None) -> LatentBatch:
    """Latents (4, 2, 4, 4) that are fixed by their rows, with the captions of the scenes."""
    return LatentBatch(
        latents=runtime.noise((4, 2, 4, 4), rows, 0, "latents"),
        texts=tuple(sample(SCENES, 0, row).caption for row in rows),
        sample_ids=torch.tensor(rows),
        fps=torch.full((len(rows),), 8.0),
    )


def fresh_task(config: TrainConfig, *, deferred: bool = False) -> Task:
    """The task of a config; a text-to-video task gets a VAE that was never trained."""
    if isinstance(config.task, AutoencoderConfig):
        return build_task(config)
    assert isinstance(config.task, TextToVideoConfig)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(runtime.address(config.seed, "weights"))
        vae = zoo.build_vae(tiny("vae", Path()).task.vae).requires_grad_(False)  # type: ignore[union-attr]
        text = zoo.build_text(config.task.text)
        return TextToVideo(config.task, vae=vae, text=text, seed=config.seed, deferred=deferred)


def make_trainer(
    config: TrainConfig,
    place: Runtime = ALONE,
    *,
    task: Task | None = None,
    source: MemorySource | None = None,
    batch_size: int = 5,
    validation_sizes: tuple[int, ...] = (),
    **options: Any,
) -> Trainer:
    """A trainer on memory, where the config's task decides what the batches are."""
    collate = clips if isinstance(config.task, AutoencoderConfig) else latents
    if task is None:
        task = fresh_task(config, deferred=engines.fills(config.engine) and place.world_size > 1)
    share = share_work(config, task, place)
    if isinstance(task, TextToVideo):
        recompute.apply(task.model, config.recompute)
    precision = torch.bfloat16 if config.precision == "bf16" else torch.float32
    engine = engines.build(
        config.engine, place, share.mesh, precision=precision, recipe=task.recipe
    )
    engine.wrap(task, partial(optim.build, config.optim))
    source = source or MemorySource(
        collate, place, batch_size=batch_size, validation_sizes=validation_sizes
    )
    source.share = share
    return Trainer(config, runtime=place, task=task, engine=engine, source=source, **options)


def train_records(output: Path) -> list[dict[str, Any]]:
    """The 'train' records of a run."""
    return [r for r in read_records(output / "metrics.jsonl") if r["kind"] == "train"]


def losses(output: Path) -> list[float]:
    """The loss of every step of a run that logs every step."""
    return [record["loss"] for record in train_records(output)]


def digests(output: Path) -> dict[str, str]:
    """SHA-256 of every tensor in the newest checkpoint of a run, and of its guard and counts."""
    snapshot = checkpoint.load(checkpoint.find(output))
    found = {}
    for part in ("weights", "ema", "optimizer", "frozen"):
        for name, tensor in getattr(snapshot, part).items():
            content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[f"{part}/{name}"] = hashlib.sha256(content).hexdigest()
    memory = {k: v for k, v in snapshot.progress.items() if k != "seconds"}
    return {**found, "step": str(snapshot.step), "progress": repr(sorted(memory.items()))}


def tensors(output: Path) -> dict[str, Tensor]:
    """The weights in the newest checkpoint of a run."""
    return checkpoint.load(checkpoint.find(output)).weights


@dataclass(frozen=True)
class ToyBatch:
    """Points of a line: inputs (B, 3), and what the samples are."""

    inputs: Tensor
    sample_ids: Tensor
    texts: tuple[str, ...]
    replaced: int = 0

    @property
    def latents(self) -> Tensor:
        return self.inputs

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: slice) -> ToyBatch:
        return ToyBatch(self.inputs[index], self.sample_ids[index], self.texts[index])


def points(rows: list[int], step: int | None = None) -> ToyBatch:
    """Inputs that are fixed by their rows."""
    return ToyBatch(
        inputs=runtime.noise((3,), rows, 0, "points"),
        sample_ids=torch.tensor(rows),
        texts=tuple(f"row {row}" for row in rows),
    )


class ToyTask(Task):
    """A linear layer that learns the sum of its inputs.

    Args:
        poison: (step, sample id) -> factor on the loss of a sample, 1 by default.
    """

    def __init__(self, poison: Callable[[int, int], float] = lambda step, row: 1.0):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.poison = poison
        self.decisions: list[bool] = []

    def forward(self, batch: ToyBatch, step: int) -> StepLoss:
        factors = torch.tensor([self.poison(step, int(row)) for row in batch.sample_ids])
        error = self.layer(batch.inputs)[:, 0] - batch.inputs.sum(1)
        per_sample = error.square() * factors
        count = torch.tensor(float(len(batch)))
        total = per_sample.sum()
        metrics = {"loss": (total.detach(), count)}
        return StepLoss(total, count, per_sample.detach(), metrics)

    @torch.no_grad()
    def validation(self, batch: ToyBatch) -> Sums:
        error = self.layer(batch.inputs)[:, 0] - batch.inputs.sum(1)
        return {"loss": (error.square().sum(), torch.tensor(float(len(batch))))}

    def tokens(self, batch: ToyBatch) -> int:
        return len(batch)

    def shape(self, batch: ToyBatch) -> dict[str, Any]:
        return {"num_frames": 1, "height": 8, "width": 8, "fps": 8.0}

    def decided(self, *, accepted: bool) -> None:
        self.decisions.append(accepted)


def toy_trainer(
    output: Path,
    *overrides: str,
    place: Runtime = ALONE,
    poison: Callable[[int, int], float] = lambda step, row: 1.0,
    validation_sizes: tuple[int, ...] = (),
    **options: Any,
) -> Trainer:
    """A trainer of the toy task; 6 rows a step."""
    config = tiny("vae", output, "optim={kind: adamw, lr: 0.01}", *overrides)
    source = MemorySource(points, place, batch_size=6, validation_sizes=validation_sizes)
    task = ToyTask(poison)
    return make_trainer(config, place, task=task, source=source, **options)
