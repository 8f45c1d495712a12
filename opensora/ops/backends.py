"""What each way to compute attention can do, and the one rule that picks one for a call.

`choose` is a function of a call, a machine and a preference, and of nothing else: the backend that
the config names where it can serve the call, else the first that can in the order of `AUTO`. What
has only been read and never been run on CUDA (all but `sdpa` and `plain` on CPUs) is said so in
docs/training.md.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from opensora.ops import kernels
from opensora.ops.patterns import Kind, Pattern

AttentionChoice = Literal[
    "auto", "sdpa", "cudnn", "flash2", "flash3", "flash4", "xformers", "varlen", "plain"
]
Attention = Callable[[Tensor, Tensor, Tensor, Pattern, bool, float | None], Tensor]
HALF = frozenset({torch.float16, torch.bfloat16})
FLOAT = HALF | {torch.float32, torch.float64}


class Request(NamedTuple):
    """What a call of attention asks for.

    Attributes:
        dtype: of the arithmetic, under autocast that of autocast.
        head_dim: d.
        mask: kind of pattern.
    """

    dtype: torch.dtype
    head_dim: int
    mask: Kind = "none"
    causal: bool = False


class Machine(NamedTuple):
    """What a device and its packages offer.

    Attributes:
        device: 'cpu', 'cuda', 'mps'.
        capability: compute capability of a CUDA device.
        parts: found among those that backends need.
    """

    device: str
    capability: tuple[int, int] = (0, 0)
    parts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Backend:
    """A way to compute attention and what it can do.

    Attributes:
        name: as in the config.
        attend: from `opensora.ops.kernels`.
        masks: kinds of patterns that it takes.
        devices: types of devices; empty means any.
        majors: CUDA compute capabilities, by major version; empty means any.
        dtypes: of its arithmetic.
        max_head_dim: largest d.
        head_dim_multiple: what d must be divisible by.
        part: of `PARTS`, which it needs.
        implementation: of torch's registry, which is activated for the process.
        operators: qualified names of what runs, whose results selective recomputation keeps.
    """

    name: str
    attend: Attention
    masks: frozenset[Kind]
    devices: frozenset[str] = frozenset()
    majors: frozenset[int] = frozenset()
    dtypes: frozenset[torch.dtype] = FLOAT
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    part: str | None = None
    implementation: str | None = None
    operators: tuple[str, ...] = ()

    def lacking(self, machine: Machine) -> str | None:
        """Why it does not run on a machine, or None."""
        if self.devices and machine.device not in self.devices:
            return f"it runs on {' and '.join(sorted(self.devices))}, and this is {machine.device}"
        if self.majors and machine.capability[0] not in self.majors:
            wanted = " or ".join(f"{major}.x" for major in sorted(self.majors))
            found = ".".join(map(str, machine.capability))
            return f"it needs compute capability {wanted}, and this GPU has {found}"
        if self.part is not None and self.part not in machine.parts:
            return f"it needs {PARTS[self.part].mend}"
        return None

    def refuses(self, request: Request) -> str | None:
        """Why it cannot serve a call where it runs, or None."""
        if request.mask not in self.masks:
            return f"it does not take {MASKS[request.mask]}"
        if request.dtype not in self.dtypes:
            names = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            return f"it computes in {names}, not in {str(request.dtype).removeprefix('torch.')}"
        if self.max_head_dim is not None and request.head_dim > self.max_head_dim:
            return f"it takes heads of up to {self.max_head_dim}, not {request.head_dim}"
        if request.head_dim % self.head_dim_multiple:
            return (
                f"it takes heads of a multiple of {self.head_dim_multiple}, not {request.head_dim}"
            )
        return None


MASKS: dict[Kind, str] = {
    "none": "attention without a mask",
    "keys": "a mask of keys",
    "frames": "an order of frames",
    "packed": "packed sequences",
}

_EVERY: frozenset[Kind] = frozenset(MASKS)
_CUDA = frozenset({"cuda"})
_ATEN = (
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
)
_CUDNN_FIRST = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
_by_flash = partial(kernels.sdpa_by, (SDPBackend.FLASH_ATTENTION,))


def _flash(name: str, implementation: str | None, majors: set[int], largest: int) -> Backend:
    """A generation of FlashAttention behind torch's operator; packed sequences go one by one."""
    return Backend(
        name,
        _by_flash,
        frozenset({"none"}),
        devices=_CUDA,
        majors=frozenset(majors),
        dtypes=HALF,
        max_head_dim=largest,
        head_dim_multiple=8,
        part=implementation,
        implementation=implementation,
        operators=_ATEN[:1],
    )


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("sdpa", kernels.sdpa, _EVERY, operators=_ATEN),
        # Which kernel sdpa takes first on Hopper differs between torch 2.9 and 2.13.
        Backend(
            "cudnn",
            partial(kernels.sdpa_by, _CUDNN_FIRST),
            frozenset({"none"}),
            devices=_CUDA,
            majors=frozenset({9, 10}),
            dtypes=HALF,
            max_head_dim=128,
            head_dim_multiple=8,
            operators=_ATEN,
        ),
        _flash("flash2", None, {8, 9, 10, 12}, 256),
        _flash("flash3", "FA3", {9}, 256),
        _flash("flash4", "FA4", {9, 10}, 128),
        Backend(
            "xformers",
            kernels.xformers,
            frozenset({"none", "packed"}),
            devices=_CUDA,
            majors=frozenset({8, 9, 10, 12}),
            dtypes=HALF,
            max_head_dim=256,
            head_dim_multiple=8,
            part="xformers",
            operators=(
                "xformers_flash.flash_fwd",
                "xformers_flash3.flash_fwd",
                "aten._efficient_attention_forward",
            ),
        ),
        Backend(
            "varlen",
            kernels.varlen,
            frozenset({"none", "packed"}),
            devices=_CUDA,
            majors=frozenset({8, 9, 10, 12}),
            dtypes=HALF,
            max_head_dim=256,
            head_dim_multiple=8,
            part="varlen",
            operators=("torch_attn._varlen_attn",),
        ),
        Backend(
            "flex",
            kernels.flex,
            frozenset({"frames"}),
            devices=_CUDA,
            majors=frozenset({8, 9, 10, 12}),
            dtypes=HALF | {torch.float32},
            max_head_dim=256,
            head_dim_multiple=8,
            part="triton",
        ),
        Backend("plain", kernels.plain, _EVERY),
    )
}

AUTO: dict[Kind, tuple[str, ...]] = {
    "none": ("cudnn", "sdpa", "plain"),
    "keys": ("sdpa", "plain"),
    "frames": ("flex", "sdpa", "plain"),
    "packed": ("varlen", "sdpa", "plain"),
}
"""Best first. FlashAttention 3 and 4 and xformers change or replace torch's own kernels and are
taken by name only."""


def choose(request: Request, machine: Machine, preferred: str = "auto") -> Backend:
    """The backend that serves a call: the preferred one if it can, else the first that can."""
    names = AUTO[request.mask] if preferred == "auto" else (preferred, *AUTO[request.mask])
    able = (BACKENDS[name] for name in names)
    return next(b for b in able if b.lacking(machine) is None and b.refuses(request) is None)


@dataclass(frozen=True)
class Part:
    """Something that a backend needs beside torch and a GPU.

    Attributes:
        found: whether it is here.
        mend: what it is and how to get it.
    """

    found: Callable[[], bool]
    mend: str


def _has_varlen() -> bool:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters


def _has_implementation(name: str, module: str) -> bool:
    listed: Callable[[], list[str]] = getattr(
        torch.nn.attention, "list_flash_attention_impls", list
    )
    return name in listed() and _has_module(module)


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # a parent of it is not there
        return False


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()


PARTS: dict[str, Part] = {
    "FA3": Part(
        partial(_has_implementation, "FA3", "flash_attn_interface"),
        "a newer torch (2.13 has its registry) and FlashAttention 3, built from its folder hopper",
    ),
    "FA4": Part(
        partial(_has_implementation, "FA4", "flash_attn.cute.interface"),
        "a newer torch (2.13 has its registry) and FlashAttention 4: pip install flash-attn-4",
    ),
    "xformers": Part(
        partial(_has_module, "xformers"), "xformers: pip install 'opensora[xformers]'"
    ),
    "varlen": Part(_has_varlen, "a newer torch (2.13 has it)"),
    "triton": Part(_has_triton, "Triton for this GPU (pip install triton, and a C compiler)"),
}


@lru_cache
def machine(device: torch.device) -> Machine:
    """The facts of a device, looked up once."""
    if device.type != "cuda":
        return Machine(device.type)
    parts = frozenset(name for name, part in PARTS.items() if part.found())
    return Machine("cuda", torch.cuda.get_device_capability(device), parts)


_preferred = "auto"


def preferred() -> str:
    """What calls prefer in this process."""
    return _preferred


def prefer(name: str) -> None:
    """Prefer a backend in this process, or none with 'auto'; `selection.select` checks it first.

    FlashAttention 3 and 4 take the place of torch's own operator while they are preferred.
    """
    global _preferred
    implementation = None if name == "auto" else BACKENDS[name].implementation
    _activate(implementation)
    _preferred = name


def _activate(implementation: str | None) -> None:
    registry = torch.nn.attention
    current = getattr(registry, "current_flash_attention_impl", lambda: None)()
    if implementation is not None and current != implementation:
        registry.activate_flash_attention_impl(implementation)
    elif implementation is None and current in ("FA3", "FA4"):
        registry.restore_flash_attention_impl()


@contextmanager
def preferring(name: str) -> Iterator[None]:
    """Prefer a backend inside it."""
    before = _preferred
    prefer(name)
    try:
        yield
    finally:
        prefer(before)


_names: dict[tuple[torch.device, torch.dtype, int, Kind, bool, str], str] = {}


def serving(
    device: torch.device, dtype: torch.dtype, head_dim: int, mask: Kind, causal: bool, wanted: str
) -> str:
    """The name of the backend that serves such a call on a device; remembered.

    A constant in a compiled graph, which is traced anew for each of these arguments.
    """
    key = (device, dtype, head_dim, mask, causal, wanted)
    name = _names.get(key)
    if name is None:
        request = Request(dtype, head_dim, mask, causal)
        name = _names[key] = choose(request, machine(device), wanted).name
    return name


# torch.compiler.assume_constant_result, without the seconds that it takes to import the compiler.
vars(serving)["_dynamo_marked_constant"] = True
