"""What `opensora plan --sample` prints."""

from __future__ import annotations

from pathlib import Path

import torch

from opensora import config as configs
from opensora import zoo
from opensora.data.buckets import levels
from opensora.engine import checkpoint, planner
from opensora.errors import UsageError
from opensora.infer.forecast import Forecast, Phases, Wanted, fitting
from opensora.infer.savings import SavingsConfig
from opensora.train.config import TrainConfig
from opensora.train.text_to_video import TextToVideoConfig, resolve
from opensora.zoo import GeneratorConfig

SMALL = "rtx4090"
"""The 24 GB card that people have."""


def plan(
    path: Path,
    overrides: list[str],
    *,
    size: tuple[int | None, int | None, int | None],
    steps: int,
    batch: int,
    gpu: str,
    teraflops: float | None,
) -> None:
    """Print what drawing takes; where it does not fit as it is, say what would.

    Args:
        path: a training config, or a run or checkpoint.
        size: frames, height, width; None takes the trained one.

    Raises:
        UsageError: nothing known here makes it fit.
    """
    config, trained = _generator(path, overrides)
    frames, height, width = (asked or own for asked, own in zip(size, trained, strict=True))
    target = planner.device(gpu)
    found = Forecast(config, Wanted(frames, height, width, steps, batch))
    plain = found.phases(SavingsConfig(), batched=True)
    rate = 0.45 * target.flops if teraflops is None else teraflops * 1e12
    _describe(found, rate, given=teraflops is not None)
    _describe_phases(found, plain)
    for name in dict.fromkeys((gpu.lower(), SMALL)):
        print(_verdict(found, name))
    if fitting(found, target) is None:
        worst = plain.worst
        raise UsageError(
            f"{batch} x {frames}x{height}x{width} does not fit one {gpu} with any savings: without "
            f"them {worst} needs {_gb(getattr(plain, worst))} of its "
            f"{_gb(target.memory - target.reserved)}. Ask for a smaller --batch, --frames or size"
        )


def _generator(path: Path, overrides: list[str]) -> tuple[GeneratorConfig, tuple[int, int, int]]:
    """A pipeline's config, and the frames, height and width that it was, or will be, trained on.

    Raises:
        UsageError: overrides for a checkpoint, or a config of another task.
    """
    if path.suffix not in (".yaml", ".yml"):
        if overrides:
            raise UsageError(f"{path} is a checkpoint: its config is what it is, without overrides")
        folder = checkpoint.find(path)
        tree = checkpoint.read_config(folder)["task"]
        if tree.get("kind") != "text_to_video":
            raise UsageError(f"{folder} is a checkpoint of '{tree.get('kind')}', which draws none")
        known = {k: v for k, v in tree.items() if k in GeneratorConfig.model_fields}
        shape = checkpoint.load(folder, parts=()).progress["shape"]
        size = (shape["num_frames"], shape["height"], shape["width"])
        return checkpoint.part_of_config(GeneratorConfig, known, folder), size
    tree = configs.override(configs.read(path), overrides)
    config = configs.validate(TrainConfig, tree, where=str(path))
    task = config.task
    if not isinstance(task, TextToVideoConfig):
        raise UsageError("opensora plan --sample knows the task text_to_video only")
    if task.vae_from is not None and task.vae_from.exists():
        task = resolve(task)
    elif task.vae is None:
        print(f"task.vae_from={task.vae_from} is not here: planned with the default VAE")
        task = task.model_copy(update={"vae": zoo.VAEConfig()})
    assert task.vae is not None
    with torch.device("meta"):
        stride = zoo.build_vae(task.vae).stride
    found = levels(config.data.buckets, stride=stride, patch=task.model.patch)
    buckets = [bucket for level in found for length in level.buckets for bucket in length]
    largest = max(buckets, key=lambda bucket: bucket.num_tokens)
    known = {key: getattr(task, key) for key in GeneratorConfig.model_fields}
    size = (largest.num_frames, largest.height, largest.width)
    return GeneratorConfig(**known), size


def _describe(found: Forecast, rate: float, *, given: bool) -> None:
    wanted, (_, frames, height, width) = found.wanted, found.latents
    source = "as given" if given else "45% of the published peak, assumed"
    size = f"{wanted.num_frames}x{wanted.height}x{wanted.width}"
    _, down, across = found.config.model.patch
    tokens = frames * (height // down) * (width // across)
    print(f"{found.parts.parameters:,} parameters; {wanted.batch} x {size}, {tokens:,} tokens each")
    print(f"{found.step_flops / 1e12:,.4g} TFLOP a step with guidance, {wanted.steps} steps:")
    seconds = found.flops / rate
    told = f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"
    print(f"{found.flops / 1e12:,.4g} TFLOP, {told} s at {rate / 1e12:.4g} TFLOP/s, {source}")
    if not found.parts.text:
        print(
            f"the sizes of the text encoder ({found.config.text.kind}) are not known: not counted"
        )


def _describe_phases(found: Forecast, plain: Phases) -> None:
    print("\npeak memory, without savings, in float32")
    rows = {
        "encode": plain.encode,
        "denoise": plain.denoise,
        "  of it weights": plain.weights,
        "  of it activations": plain.activations,
        "decode, whole": plain.decode,
    }
    for name, tile in (("decode, by frames", False), ("decode, in tiles by frames", True)):
        savings = SavingsConfig.model_validate({"decode": {"chunk": 1, "tile": tile}})
        rows[name] = found.phases(savings, batched=True).decode
    for name, value in rows.items():
        print(f"{_gb(value):>12}  {name}")
    print()


def _verdict(found: Forecast, gpu: str) -> str:
    """Whether and how it fits a device."""
    target = planner.device(gpu)
    way = fitting(found, target)
    room = f"{_gb(target.memory - target.reserved)} of one {gpu}"
    if way is None:
        return f"does not fit {room}"
    savings, batched, phases = way
    options = options_of(savings, batched)
    host = f", {_gb(phases.host)} on the host" if phases.host else ""
    told = f"with {' '.join(options)}" if options else "as it is"
    but = "" if found.parts.text else ", without the text encoder"
    return f"fits {room} {told}: {_gb(phases.peak)}{host}{but}"


def options_of(savings: SavingsConfig, batched: bool) -> list[str]:
    """The options of `opensora sample` that ask for it."""
    found = ["--offload"] if savings.offload else []
    if savings.quantize != "none":
        found.append(f"--quantize {savings.quantize}")
    if savings.decode.tile is True:
        found.append("--tile-vae always")
    if savings.decode.chunk is not None:
        found.append(f"--decode-chunk {savings.decode.chunk}")
    return found if batched else [*found, "--set guidance.batched=false"]


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.2f} MB"
