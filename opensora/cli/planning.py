"""What `opensora plan` prints."""

from __future__ import annotations

from opensora.config import Config
from opensora.engine import planner
from opensora.engine.planner import Device
from opensora.errors import UsageError
from opensora.ops import backends
from opensora.train.config import TrainConfig
from opensora.train.forecast import Forecast, Row, forecast
from opensora.train.suggestion import Attempt, fitting, search
from opensora.train.text_to_video import TextToVideoConfig, resolve

SUSTAINED = 0.45
"""Of the published peak; what the best published video trainings reach (inferred, not measured
here)."""


def plan(
    config: TrainConfig,
    *,
    ranks: int,
    gpu: str,
    teraflops: float | None,
    price: float | None,
) -> None:
    """Print the plan; where it does not fit, say what would.

    Raises:
        UsageError: it does not fit.
    """
    target = planner.device(gpu)
    config = _with_vae(config)
    # All kernels keep the same; only plain arithmetic keeps the logits.
    backends.prefer("plain" if config.attention == "plain" else "auto")
    rate = SUSTAINED * target.flops if teraflops is None else teraflops * 1e12
    found = forecast(config, ranks, target, rate=rate)
    _describe(config, found, target, gpu, rate, given=teraflops is not None)
    _describe_run(config, found, ranks, price)
    worst = found.peak
    if worst.memory.total <= target.memory:
        return
    tried = search(config, ranks, target, worst.bucket)
    _describe_search(config, tried)
    better = fitting(tried, target)
    largest = max(vars(worst.memory).items(), key=lambda item: item[1])
    problem = (
        f"{worst.bucket.shape} needs {_gb(worst.memory.total)} of the {_gb(target.memory)} of one "
        f"{gpu}, {_gb(largest[1])} of it for {largest[0]}"
    )
    if better is None:
        raise UsageError(f"{problem}. Nothing known here makes it fit; take more or larger devices")
    raise UsageError(f"{problem}. This fits: {' '.join(_changes(config, better))}")


def _with_vae(config: TrainConfig) -> TrainConfig:
    """The config with the VAE of `vae_from`, where that is on this machine already."""
    task = config.task
    if not isinstance(task, TextToVideoConfig) or task.vae_from is None:
        return config
    if task.vae_from.exists():
        return config.model_copy(update={"task": resolve(task)})
    if task.vae is None:
        print(f"task.vae_from={task.vae_from} is not here: planned with the default VAE")
    return config


def _changes(old: TrainConfig, new: TrainConfig) -> list[str]:
    """The overrides that lead from one config to the other."""
    found = []
    for key in ("engine", "parallel", "recompute", "optim"):
        before, after = getattr(old, key), getattr(new, key)
        if before != after:
            found += [f"{key}.{name}={value}" for name, value in _set(before, after)]
    return found


def _set(before: Config, after: Config) -> list[tuple[str, object]]:
    defaults = {name: field.default for name, field in type(after).model_fields.items()}
    old = {**defaults, "kind": None, **before.model_dump()}
    return [(name, value) for name, value in after.model_dump().items() if old[name] != value]


def _describe(
    config: TrainConfig, found: Forecast, target: Device, gpu: str, rate: float, *, given: bool
) -> None:
    layout = " x ".join(f"{axis} {size}" for axis, size in vars(found.layout).items() if size > 1)
    source = "as given" if given else f"{SUSTAINED:.0%} of the published peak, assumed"
    print(f"{found.parameters:,} parameters on {found.layout.world_size} {gpu} ({layout or 'one'})")
    print(f"{rate / 1e12:.0f} TFLOP/s a device, {source}\n")
    print(f"{'batch':>20} {'tokens':>9} {'shared':>6} {'TFLOP':>9} {'again':>6} {'s/step':>8}")
    for row in found.rows:
        again = row.flops / row.model_flops - 1
        size = f"{row.bucket.batch_size} x {row.bucket.shape}"
        print(
            f"{size:>20} {row.bucket.num_tokens:>9,} {row.degree:>6} "
            f"{row.model_flops / 1e12:>9,.1f} {again:>6.0%} {row.seconds:>8.2f}"
        )
    _describe_memory(found.peak, target, gpu)


def _describe_memory(row: Row, target: Device, gpu: str) -> None:
    print(f"\npeak memory of a rank, at {row.bucket.shape} with {row.clips} clips at a time")
    for name, value in vars(row.memory).items():
        if value and name != "host":
            print(f"{_gb(value):>12}  {name}")
    share = row.memory.total / target.memory
    print(f"{_gb(row.memory.total):>12}  of {_gb(target.memory)} on one {gpu} ({share:.0%})")
    if row.memory.host:
        print(f"{_gb(row.memory.host):>12}  of pinned host memory beside it")
    print()


def _describe_search(config: TrainConfig, tried: list[Attempt]) -> None:
    print("\nwhat it would take, changed:")
    for attempt in tried:
        least = "" if attempt.rehearsed else "at least "
        changes = " ".join(_changes(config, attempt.config)) or "nothing"
        print(f"{least + _gb(attempt.memory):>20}  {changes}")


def _describe_run(config: TrainConfig, found: Forecast, ranks: int, price: float | None) -> None:
    seconds = config.steps * sum(row.seconds for row in found.rows) / len(found.rows)
    hours = seconds / 3600
    units = ((48, f"{hours / 24:.1f} days"), (1, f"{hours:.1f} hours"))
    told = next((text for least, text in units if hours > least), f"{seconds:.0f} seconds")
    mixed = ", the shapes in equal parts" if len(found.rows) > 1 else ""
    cost = "" if price is None else f", {hours * ranks * price:,.2f} at {price:g} an hour a device"
    print(f"{config.steps:,} steps: {told}, {hours * ranks:,.2f} device-hours{mixed}{cost}")


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB"
