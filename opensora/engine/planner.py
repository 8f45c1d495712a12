"""Arithmetic before a launch: memory by part, time, and money, from footprints and device facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from opensora.engine.footprint import Footprint
from opensora.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a device.

    Attributes:
        memory: bytes that a process can have.
        flops: peak FLOP/s of dense bf16 matrix products, as published.
        reserved: bytes that context, libraries, communication and fragmentation take (inferred;
            never measured on these devices by this project).
    """

    memory: float
    flops: float
    reserved: float = 3e9


GIB = 2**30
DEVICES = {
    "a100-40": Device(39.4 * GIB, 312e12),
    "a100-80": Device(79.1 * GIB, 312e12),
    "h100": Device(79.1 * GIB, 989e12),
    "h200": Device(139.8 * GIB, 989e12),
    "b200": Device(178.0 * GIB, 2250e12),
    "l40s": Device(44.4 * GIB, 362e12),
    "rtx4090": Device(23.5 * GIB, 165e12, reserved=1.5e9),
}
"""NVIDIA's data sheets for FLOP/s, and what drivers leave of the memory."""


def device(name: str) -> Device:
    """A device by name.

    Raises:
        UsageError: it is not known.
    """
    if name.lower() not in DEVICES:
        known = ", ".join(DEVICES)
        raise UsageError(
            f"--gpu {name} is unknown; known are {known}.{did_you_mean(name.lower(), DEVICES)}"
        )
    return DEVICES[name.lower()]


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank by what they hold, at the worst moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    averages: float
    frozen: float
    activations: float
    gathered: float
    reserved: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """Of the device; `host` is pinned memory elsewhere."""
        return sum(vars(self).values()) - self.host


@dataclass(frozen=True)
class Held:
    """What a rank holds of the parameters of a run, in float32 copies of all of them.

    Attributes:
        whole: whether the optimizer's step is that of the whole model, so that a rehearsal of it
            says what it takes; its gradients are then among the activations.
        weights, gradients, averages: copies.
        optimizer: what part of the optimizer's state.
        gathered: whether parameters are gathered when they are used.
        buffers: bytes that exchanges take beside.
    """

    whole: bool = True
    weights: float = 1.0
    gradients: float = 0.0
    averages: float = 1.0
    optimizer: float = 1.0
    gathered: bool = False
    buffers: float = 0.0


def memory(
    footprint: Footprint,
    held: Held,
    target: Device,
    *,
    averages: bool,
    frozen_bytes: float,
    unit_parameters: int,
    gather_bytes: int,
) -> Memory:
    """Peak memory of a rank.

    Args:
        averages: whether an average of the weights is kept.
        unit_parameters: of the largest part that is gathered at once; the next one is on its way.
        gather_bytes: of a gathered parameter.
    """
    copy = 4.0 * footprint.parameters
    return Memory(
        weights=held.weights * copy,
        gradients=held.gradients * copy,
        optimizer=held.optimizer * footprint.state,
        averages=held.averages * copy if averages else 0.0,
        frozen=frozen_bytes,
        activations=footprint.activations,
        gathered=2 * gather_bytes * unit_parameters * held.gathered + held.buffers,
        reserved=target.reserved,
        host=footprint.host + held.optimizer * footprint.host_state,
    )


def extrapolate(
    at: Callable[[dict[str, int]], Footprint], depths: dict[str, tuple[int, ...]]
) -> Footprint:
    """The footprint at any depth, from those of shallow models: each further layer adds the same.
    (The first does not: what lies before the blocks is kept with it.)

    Args:
        at: the footprint at some depths, by name.
        depths: name -> (layers wanted, how many make the peaks lie where they lie in a deep model,
            after how many more the next ones are alike).
    """
    shallow = {
        key: wanted if wanted < first + 2 * step else first + (wanted - first) % step
        for key, (wanted, first, step) in depths.items()
    }
    base = at(shallow)
    slopes = []
    for name, (depth, _, step) in depths.items():
        if depth > shallow[name]:
            times = (depth - shallow[name]) // step
            slopes.append((at({**shallow, name: shallow[name] + step}), times))
    return Footprint(
        *(
            round(
                getattr(base, f)
                + sum(n * (getattr(more, f) - getattr(base, f)) for more, n in slopes)
            )
            for f in vars(base)
        )
    )
