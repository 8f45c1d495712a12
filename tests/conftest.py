"""A small world on disk that the tests of several rooms share: clips, latents, untrained runs."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture(autouse=True)
def signals_stay():
    """No test leaves a signal handled in another way: the processes that later ones start would
    inherit it."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture
def one_thread():
    """Sums are taken in one order, whatever the machine; ranks that are threads compute alone."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class World:
    """Folders of one session, all of 5x32x32 clips.

    Attributes:
        train, heldout: manifests of 24 and 7 rendered scenes.
        vae: a run of the tiny autoencoder with fresh weights, whose latents were measured.
        generator: a run of the tiny text-to-video model with fresh weights on the latents of `vae`.
        latents: caches of both manifests, `latents/train` and `latents/heldout`.
    """

    root: Path

    @property
    def train(self) -> Path:
        return self.root / "train" / "manifest.csv"

    @property
    def heldout(self) -> Path:
        return self.root / "heldout" / "manifest.csv"

    @property
    def vae(self) -> Path:
        return self.root / "vae"

    @property
    def generator(self) -> Path:
        return self.root / "generator"

    @property
    def latents(self) -> Path:
        return self.root / "latents"

    def overrides(self, name: str, output: Path) -> list[str]:
        """What makes a tiny config use this world: quiet, on the CPU, writing to `output`."""
        places = {
            "vae": {"data.manifest": self.train, "data.validation": self.heldout},
            "stdit": {
                "task.vae_from": self.vae,
                "data.cache": self.latents / "train",
                "data.validation": self.latents / "heldout",
            },
            "encode": {"vae_from": self.vae, "manifest": self.train},
        }[name]
        assigned = [f'{key}="{path}"' for key, path in {"output": output, **places}.items()]
        return [*assigned, "device=cpu", *(["log.bar=false"] if name != "encode" else [])]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """Made once a session, in about two seconds."""
    import torch

    torch.set_num_threads(1)
    world = World(tmp_path_factory.mktemp("world"))
    _render(world)
    _write_runs(world)
    _encode(world)
    return world


def _render(world: World) -> None:
    from opensora.arena.dataset import write_dataset
    from opensora.arena.scenes import SceneConfig
    from opensora.config import load

    scenes = load(SceneConfig, CONFIGS / "tiny" / "scenes.yaml")
    write_dataset(world.train.parent, scenes, seed=0, count=24)
    write_dataset(world.heldout.parent, scenes, seed=0, count=7, split="heldout")


def _write_runs(world: World) -> None:
    """Checkpoints as training would leave them after step 1, without the training."""
    from opensora import config, runtime
    from opensora.data import sources
    from opensora.engine import checkpoint, saving
    from opensora.train.config import TrainConfig
    from opensora.train.run import build_task, needs_of, settle

    place = runtime.start("cpu")
    for name, folder in (("vae", world.vae), ("stdit", world.generator)):
        overrides = world.overrides(name, folder)
        if name == "stdit":  # the latents come later
            clips = f'data={{kind: clips, manifest: "{world.train}", buckets: '
            overrides += [clips + "{resolutions: {32px: {5: {batch_size: 6}}}, fps: 8}}"]
        loaded = config.load(TrainConfig, CONFIGS / "tiny" / f"{name}.yaml", overrides)
        loaded = settle(loaded, place, {"fp32": 1.0, "bf16": 1.0})
        task = build_task(loaded)
        source = sources.open_source(loaded.data, needs_of(loaded, task), seed=0)
        if name == "vae":
            task.finish(source.validation(), place)
        snapshot = checkpoint.Snapshot(
            step=1,
            config=loaded.json_text(),
            weights=dict(task.state_dict()),
            frozen=task.frozen(),
            progress={"shape": task.shape(next(source.train(0)))},
        )
        saving.save(folder / "checkpoints", snapshot, keep=1)


def _encode(world: World) -> None:
    from opensora import config
    from opensora.cli.encoding import EncodeConfig, run

    for name, manifest in (("train", world.train), ("heldout", world.heldout)):
        overrides = [*world.overrides("encode", world.latents / name), f'manifest="{manifest}"']
        run(config.load(EncodeConfig, CONFIGS / "tiny" / "encode.yaml", overrides))
