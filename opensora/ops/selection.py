"""Attention at the start of a run: is the wanted backend here, does it compute attention, what
serves which part of a model.

A backend is believed after a trial: a few tokens, forward and backward, beside plain arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opensora.errors import UsageError
from opensora.ops.backends import (
    BACKENDS,
    Backend,
    Request,
    machine,
    prefer,
    preferred,
    serving,
)
from opensora.ops.patterns import kind_of

QUERIES, KEYS, HEADS = 200, 77, 2
"""Of a trial: no multiples of a kernel's block."""


@dataclass(frozen=True)
class Selection:
    """What serves a run.

    Attributes:
        self_attention: name of the backend for attention without a mask.
        cross_attention: name of that for a mask of keys.
        operators: qualified names of the operators that each of the two ran, such as
            'aten._scaled_dot_product_flash_attention'.
    """

    self_attention: str
    cross_attention: str
    operators: tuple[frozenset[str], frozenset[str]]

    @property
    def names(self) -> tuple[str, str]:
        return self.self_attention, self.cross_attention

    def __str__(self) -> str:
        return f"{self.self_attention} for self-attention, {self.cross_attention} for cross"


def select(wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Selection:
    """Make calls in this process prefer a backend, and try what will serve them.

    Args:
        wanted: 'auto' or a backend's name.
        dtype: of attention's arithmetic.
        head_dim: d of the model's heads.

    Raises:
        UsageError: the wanted backend cannot serve self-attention here, or does not compute it.
    """
    if wanted != "auto":
        backend, request = BACKENDS[wanted], Request(dtype, head_dim)
        reason = backend.lacking(machine(device)) or backend.refuses(request)
        if reason is not None:
            raise UsageError(
                f"attention={wanted} cannot serve this run: {reason}. Set attention=auto"
                f"{_others(device, request)}"
            )
    before = preferred()
    try:
        prefer(wanted)
        return _tried(device, dtype, head_dim)
    except Exception as error:
        prefer(before)
        if isinstance(error, UsageError):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"attention={wanted} fails on {device} with heads of {head_dim} in {dtype}: {reason}. "
            "Set attention=sdpa, or =plain where memory allows"
        ) from error


def _others(device: torch.device, request: Request) -> str:
    able = [
        b.name
        for b in BACKENDS.values()
        if b.lacking(machine(device)) is None and b.refuses(request) is None
    ]
    return f" or one of {', '.join(able)}"


def _tried(device: torch.device, dtype: torch.dtype, head_dim: int) -> Selection:
    q, k, v = _tensors(device, dtype, head_dim)
    mask = torch.arange(KEYS, device=device)[None] < KEYS - 9
    names, operators = [], []
    for keys, values, seen in ((q, q, None), (k, v, mask)):
        name = serving(device, dtype, head_dim, kind_of(seen), False, preferred())
        names.append(name)
        operators.append(_agrees(name, q, keys, values, seen))
    return Selection(names[0], names[1], (operators[0], operators[1]))


def _tensors(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, length, HEADS, head_dim, generator=generator).to(device, dtype)
        for length in (QUERIES, KEYS, KEYS)
    ]


def _agrees(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> frozenset[str]:
    """The operators that a backend runs, once it is seen to agree with plain arithmetic."""

    def gradients(by: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
            out = BACKENDS[by].attend(inputs[0], inputs[1], inputs[2], mask, False, None)
            return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]

    wide = torch.promote_types(q.dtype, torch.float32)
    expected = gradients("plain", wide)
    with _Watching() as watching:
        found = gradients(name, q.dtype)
    # Catches a kernel that is wrong, not one that rounds: GPUs may multiply fp32 as TF32.
    tolerance = 8 * max(torch.finfo(q.dtype).eps, 2**-10)
    for part, mine, theirs in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        error = ((mine.to(wide) - theirs).abs().max() / theirs.abs().max()).item()
        if not error <= tolerance:
            raise UsageError(
                f"attention={name} does not compute attention on {q.device}: its {part} is "
                f"{error:.1%} off in {q.dtype}. Set attention=sdpa, or =plain where memory allows"
            )
    return frozenset(watching.seen)


class _Watching(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # a wrapper that imports the compiler, a second or two; nothing here needs it

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.seen.add(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


def survey(device: torch.device) -> list[tuple[Backend, str | None]]:
    """Every backend with the reason why a device cannot use it, or None.

    Those that take attention without a mask are tried, in bf16 on CUDA and else in fp32.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [(backend, _obstacle(backend, device, dtype)) for backend in BACKENDS.values()]


def _obstacle(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    reason = backend.lacking(machine(device))
    if reason is not None or "none" not in backend.masks:
        return reason
    before = preferred()
    try:
        select(backend.name, device, dtype, 64)
    except UsageError as error:
        return str(error)
    finally:
        prefer(before)
    return None
