"""Regional compilation: torch.compile applied to a model's blocks, from outside.

All blocks of a kind share one compiled graph, so that compiling takes the time of one block and
not of the model. Only training runs compiled; validation and sampling, whose shapes are their own,
run as they are. Every shape of batch gets its own kernels and keeps them, whichever came first, so
that a resumed run does the same arithmetic as one that was never stopped.
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opensora.errors import UsageError

Backend = str | Callable[..., Any]
CompileChoice = Literal["auto", "always", "never"]

NUM_SHAPES = 256
"""Shapes of batch that one run may compile for; a training plan with more is refused at the 257th
rather than slowed down in silence."""

_training = ContextVar("training", default=False)


def missing(device: torch.device) -> str | None:
    """What this machine lacks to compile for a device, with the way to mend it; None if nothing."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        found = has_triton()
        return None if found else "Triton for this GPU (pip install triton, and a C compiler)"
    if platform.system() == "Windows":
        return "a compiler that torch supports on Windows"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler (on Debian: apt install g++)"
    return None


def choose(choice: CompileChoice, device: torch.device) -> bool:
    """Whether to compile: 'auto' does on a GPU that has what it takes.

    On a CPU compiling costs up to a minute and gains a fifth to a third of a step, which only long
    runs win back; they ask for it.

    Raises:
        UsageError: 'always', where something is missing.
    """
    if choice == "never" or (choice == "auto" and device.type != "cuda"):
        return False
    lacking = missing(device)
    if lacking and choice == "always":
        raise UsageError(f"compile=always needs {lacking}, which is not found; or set compile=auto")
    return lacking is None


@contextmanager
def in_training() -> Iterator[None]:
    """Inside it compiled blocks run compiled, whether or not gradients are asked for: a part of a
    training step whose graph is made later."""
    token = _training.set(True)
    try:
        yield
    finally:
        _training.reset(token)


def apply(blocks: Sequence[nn.Module], *, backend: Backend = "inductor") -> None:
    """Compile the forward of each block for training, in place; parameters keep their names.

    Args:
        backend: of torch.compile; tests look at what is compiled through one of their own.
    """
    import torch._dynamo.config as settings

    settings.recompile_limit = max(settings.recompile_limit, NUM_SHAPES)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, NUM_SHAPES)
    settings.fail_on_recompile_limit_hit = True
    for block in blocks:
        block.forward = _trained(block, backend)


def _trained(block: nn.Module, backend: Backend) -> Callable[..., Any]:
    """The block's forward, compiled where gradients are asked for."""
    plain = block.forward
    compiled = torch.compile(plain, dynamic=False, backend=backend)
    names = list(inspect.signature(type(block).forward).parameters)[1:]  # without self
    varying = {names.index(name): dim for name, dim in getattr(block, "varying_dims", {}).items()}

    def forward(*inputs: Any) -> Any:
        if not (torch.is_grad_enabled() or _training.get()):
            return plain(*inputs)
        for position, dim in varying.items():
            _mark(inputs[position], dim)
        return compiled(*inputs)

    return forward


def _mark(value: Tensor, dim: int) -> None:
    """Say that the length of a dim is no constant; a length of 1 is a case of its own."""
    torch._dynamo.maybe_mark_dynamic(value, dim)
