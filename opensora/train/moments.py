"""Optimizer state in less of a device's memory: in bfloat16, or on the host.

The optimizer itself is as it is. A few parameters at a time, their state is widened to float32 and
brought to the device, the step is made, and the state goes back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from opensora.config import Config
from opensora.dist.sharded import is_sharded, local
from opensora.engine.host import to_host

AT_A_TIME = 2**25
"""Elements whose state is in float32 on the device at a time, 256 MB of AdamW's two moments."""

COUNTER = "step"


class StateConfig(Config):
    """Where and how an optimizer's state is kept between steps."""

    state_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="of momentum and moments; bf16 halves them and is rounded stochastically",
    )
    offload: bool = Field(
        default=False,
        description="keep the state in pinned host memory (a GPU's); changes no value",
    )

    @property
    def stored_otherwise(self) -> bool:
        return self.offload or self.state_dtype != "fp32"


def stored(
    optimizer: torch.optim.Optimizer, config: StateConfig, *, at_a_time: int | None = AT_A_TIME
) -> torch.optim.Optimizer:
    """The optimizer, with its state kept as the config says.

    Args:
        at_a_time: elements; None where parameters of one shape are one batch of arithmetic.
    """
    return Stored(optimizer, config, at_a_time) if config.stored_otherwise else optimizer


class Stored(torch.optim.Optimizer):
    """Makes the steps of another optimizer, whose state it keeps.

    With `offload` alone the steps are equal bit for bit. `state` reads and writes as any
    optimizer's, in the stored dtype.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: StateConfig, at_a_time: int | None
    ):
        super().__init__([dict(group) for group in optimizer.param_groups], {})
        self._optimizer, self._config, self._at_a_time = optimizer, config, at_a_time
        self.state = cast(Any, _Slots(config))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        pairs = list(zip(self.param_groups, self._optimizer.param_groups, strict=True))
        for mine, theirs in pairs:
            theirs.update({**mine, "params": []})
        for mine, theirs in pairs:
            for some in _portions(mine["params"], self._at_a_time):
                theirs["params"] = some
                self._step(some)
            theirs["params"] = []

    def _step(self, parameters: list[Tensor]) -> None:
        inner = self._optimizer.state
        for p in parameters:
            for key, value in self.state[p].items():
                inner[p][key] = value if key == COUNTER else value.to(p.device, p.dtype)
        self._optimizer.step()
        for p in parameters:
            values = inner.pop(p)
            for key, value in values.items():
                if key != COUNTER and self._config.state_dtype == "bf16":
                    assert p.grad is not None
                    value = rounded(local(value), local(p.grad), values.get(COUNTER))
                self.state[p][key] = value


def _portions(parameters: list[Tensor], at_a_time: int | None) -> Iterator[list[Tensor]]:
    """Parameters with gradients, those of one shape together as long as they are not too many."""
    by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for p in parameters:
        if p.grad is not None:
            by_shape[p.shape].append(p)
    for alike in by_shape.values():
        number = len(alike)
        if at_a_time is not None:
            number = max(1, at_a_time // max(1, local(alike[0]).numel()))
        yield from (alike[k : k + number] for k in range(0, len(alike), number))


def rounded(value: Tensor, gradient: Tensor, count: Tensor | None = None) -> Tensor:
    """float32 -> bfloat16 of the same mean: up with the probability of the part that is cut off.

    To the nearest, a second moment never falls below what it once was: with beta2 = 0.999 it is to
    shrink by 1/1000 a step, less than half of bfloat16's spacing. Stochastic rounding mends that
    (Zamirai et al. 2020, arXiv 2010.06192). The noise is a hash of value, gradient and step, so it
    needs no generator and is the same on any layout and after a resume.

    Args:
        value, gradient: float32 of one shape.
        count: steps so far, a scalar.
    """
    bits = value.contiguous().view(torch.int32)
    noise = gradient.float().contiguous().view(torch.int32) ^ bits
    if count is not None:
        noise += count.to(noise.device, torch.int32)
    for shift, factor in ((16, 0x7FEB352D), (15, -0x7B935975)):  # lowbias32 (C. Wellons 2018)
        noise ^= (noise >> shift) & ((1 << (32 - shift)) - 1)
        noise *= factor
    noise = (noise >> 16) & 0xFFFF
    return noise.add_(bits).bitwise_and_(-0x10000).view(torch.float32).to(torch.bfloat16)


class _Slots(dict):
    """The state of each parameter, made when it is first asked for."""

    def __init__(self, config: StateConfig):
        super().__init__()
        self._config = config

    def __missing__(self, parameter: Tensor) -> _Slot:
        slot = self[parameter] = _Slot(parameter, self._config)
        return slot


class _Slot(MutableMapping):
    """Of a sharded parameter this rank's part, read as a tensor that is sharded as it is."""

    def __init__(self, parameter: Tensor, config: StateConfig):
        self._parameter, self._config = parameter, config
        self._values: dict[str, Tensor] = {}

    def __setitem__(self, key: str, value: Tensor) -> None:
        if key != COUNTER:
            narrow = torch.bfloat16 if self._config.state_dtype == "bf16" else torch.float32
            value = local(value).to(narrow)
            if self._config.offload:
                value = to_host(value)
        self._values[key] = value

    def __getitem__(self, key: str) -> Tensor:
        value, p = self._values[key], self._parameter
        if key == COUNTER:
            return value
        if not is_sharded(p):
            return value
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            value.to(p.device),
            p.device_mesh,
            p.placements,
            run_check=False,
            shape=p.shape,
            stride=p.stride(),
        )

    def __delitem__(self, key: str) -> None:
        del self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
