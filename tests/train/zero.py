"""What `test_zero.py` runs on several ranks under DeepSpeed: `zero.py OUT`; the counterpart of
`ranks.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from runs import training
from torch import nn
from train_support import StepLoss, tiny

from opensora import disk, runtime
from opensora.dist.mesh import Layout
from opensora.engine import engines
from opensora.engine.footprint import LiveMemory
from opensora.engine.zero import DeepspeedConfig
from opensora.runtime import Runtime
from opensora.train import optim, run

COMMON = ("optim={kind: adamw, lr: 0.002, weight_decay: 0.1}", "max_grad_norm=0.5")
"""Gradients of the tiny run have norms of 0.6 and more, so that every step is clipped."""

CASES: dict[str, tuple[str, ...]] = {
    "pieces_1": ("engine={kind: deepspeed, stage: 1}", "micro_batch=2"),
    "offloaded_2": (
        "engine={kind: deepspeed, stage: 2, offload_optimizer: true}",
        "micro_batch=2",
        "recompute.policy=pair",
    ),
    "pieces_3": (
        "engine={kind: deepspeed, stage: 3}",
        "micro_batch=2",
        "recompute.policy=pair",
        "validation.every=2",
    ),
    "shared_1": ("engine={kind: deepspeed, stage: 1}", "parallel.ulysses=2"),
    "shared_3": (
        "engine={kind: deepspeed, stage: 3, offload_optimizer: true}",
        "parallel.ulysses=2",
    ),
}
ON_FOUR = ("pieces_1", "shared_3")


def steps_of(seen: list[Any]) -> list[Any]:
    """Without the batches that stood in for validation batches."""
    return [rows for k, rows in enumerate(seen) if all(rows[0] > other[0] for other in seen[:k])]


def goes_on(output: Path, place: Runtime) -> Any:
    """From the run that `test_zero.py` began on one rank, three steps in stage 2, three in 3."""
    for stage, steps in ((2, 8), (3, 11)):
        engine = f"engine={{kind: deepspeed, stage: {stage}}}"
        changes = [f"steps={steps}", "resume_despite=[steps]", engine, "micro_batch=2"]
        rows = training(output, place, "stdit", *COMMON, *changes)
    return rows


def muon(output: Path, place: Runtime) -> Any:
    """Stage 0 shards nothing, so matrices are whole."""
    return training(output, place, "stdit", "engine={kind: deepspeed, stage: 0}", "micro_batch=2")


SYNTHETIC = (
    "data={kind: synthetic, num_samples: 16, buckets: {resolutions: {32px: {5: {batch_size: 4}}}, "
    'aspect_ratios: ["1:1"]}}'
)


def command(output: Path, place: Runtime, *overrides: str) -> Any:
    """What `opensora train` runs, with a model that is built as an engine wants it."""
    changes = ["steps=3", "task.vae_from=null", SYNTHETIC, *COMMON, *overrides]
    run.train(tiny("stdit", output, *changes), place)


def command_in_stage_3(output: Path, place: Runtime) -> Any:
    return command(output, place, "engine={kind: deepspeed, stage: 3}")


def refusals(output: Path, place: Runtime) -> Any:
    """The gradient of one rank is no number in the second of three steps."""
    return [_refusals(stage, place) for stage in (1, 2, 3)]


class Line(nn.Module):
    """total = sum of layer(x)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> StepLoss:
        return StepLoss(self.layer(x).sum(), torch.tensor(1.0), torch.zeros(1))


def _refusals(stage: int, place: Runtime) -> list[Any]:
    config = DeepspeedConfig(stage=stage)  # type: ignore[arg-type]
    engine = engines.build(config, place, None, precision=torch.float32)
    module = Line()
    engine.wrap(module, lambda m: optim.build(optim.AdamWConfig(lr=0.1), m))
    found = []
    for step in range(3):
        bad = step == 1 and place.rank == place.world_size - 1
        engine.backward(torch.full((1, 3), float("nan") if bad else 1.0))
        update = engine.step(scale=1.0, max_norm=1.0, factor=1.0, accept=lambda n: n == n)
        weights = engine.state_dict()["weights"]
        found.append((update.accepted, weights["layer.weight"].tolist() if weights else None))
    return found


class Deep(nn.Module):
    """Blocks, which stage 3 gathers one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 256)
        self.blocks = nn.ModuleList(nn.Linear(256, 256) for _ in range(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return x


class Outer(nn.Module):
    """A task, whose child is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Deep()

    def forward(self, x: torch.Tensor) -> StepLoss:
        return StepLoss(self.model(x).sum(), torch.tensor(1.0), torch.zeros(1))


def memory(output: Path, place: Runtime) -> Any:
    """(planned, most at a time) float32 numbers per parameter, in each stage."""
    return [_memory(stage, place) for stage in (1, 2, 3)]


def _memory(stage: int, place: Runtime) -> tuple[float, float]:
    config = DeepspeedConfig(stage=stage, bucket=70_000)  # type: ignore[arg-type]
    with LiveMemory() as alive:
        before = alive.live
        engine = engines.build(config, place, None, precision=torch.float32)
        engine.wrap(Outer(), lambda m: optim.build(optim.AdamWConfig(), m))
        for _ in range(2):
            alive.reset()
            engine.backward(torch.ones(1, 8))
            engine.step(scale=1.0, max_norm=1.0, factor=1.0, accept=lambda norm: True)
    count = 8 * 256 + 256 + 16 * (256 * 256 + 256)
    held = engines.held(config, Layout(dp_shard=place.world_size), count)
    gathered = 2 * held.gathered * (256 * 256 + 256) / count
    planned = held.weights + held.gradients + 2 * held.optimizer + held.buffers / 4 / count
    return planned + gathered, (alive.peak - before) / 4 / count


def main(output: Path) -> None:
    place = runtime.start("cpu", timeout_seconds=120)
    four = place.world_size == 4
    scenarios: dict[str, Callable[[], Any]] = {
        name: lambda name=name: steps_of(
            training(output / name, place, "stdit", *COMMON, *CASES[name])
        )
        for name in (ON_FOUR if four else CASES)
    }
    for other in () if four else (muon, goes_on, command_in_stage_3, refusals, memory):
        scenarios[other.__name__] = lambda other=other: other(output / other.__name__, place)
    for name, scenario in scenarios.items():
        disk.replace_file(output / f"{name}-{place.rank}.json", json.dumps(scenario()).encode())
    place.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
