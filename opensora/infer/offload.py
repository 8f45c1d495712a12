"""Weights that wait on the host and come to the device when they are needed.

Of a denoiser's blocks, one and the next few are on the device at a time: while one computes, the
next ones are copied from pinned memory on a stream of their own. Text encoder and VAE are there
only while they work. Values are the same bit for bit, and a CPU takes the same path, with copies
in the place of transfers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora.errors import UsageError


@dataclass
class Visitor:
    """A block's tensors: what holds each, under which name, and its value on the host.

    Attributes:
        here: those on the device, while it is there.
        arrived: the event after which they may be read.
    """

    places: list[tuple[dict[str, Any], str, Tensor]] = field(default_factory=list)
    here: list[Tensor] | None = None
    arrived: Any = None


class BlockStream:
    """Streams a model's blocks to a device.

    Attributes:
        most: blocks that were there at the same time, at most.
        fetched: copies of a block that were begun.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, ahead: int = 1):
        """
        Args:
            model: on the CPU, not in training; its other parts move to the device now.
            ahead: blocks that are fetched before they are needed.

        Raises:
            UsageError: the model is in training.
        """
        if model.training:
            raise UsageError("offload of weights serves sampling only: put the model in eval mode")
        self.device, self.ahead = device, ahead
        self.most = self.fetched = 0
        blocks: list[nn.Module] = list(model.blocks)  # type: ignore[arg-type]
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        inside = {id(module) for block in blocks for module in block.modules()}
        for module in model.modules():
            if id(module) not in inside:
                for held, name, value in _tensors(module):
                    held[name] = _like(value, value.detach().to(device))
        self._visitors = [self._visitor(block) for block in blocks]
        self._hooks = []
        for number, block in enumerate(blocks):
            before, after = partial(self._before, number), partial(self._after, number)
            self._hooks.append(block.register_forward_pre_hook(before))
            self._hooks.append(block.register_forward_hook(after, always_call=True))

    def _visitor(self, block: nn.Module) -> Visitor:
        visitor = Visitor()
        for module in block.modules():
            for held, name, value in _tensors(module):
                if self._side is not None and type(value.data) is Tensor:
                    value.data = value.data.pin_memory()
                visitor.places.append((held, name, value))
        return visitor

    @property
    def present(self) -> list[int]:
        """Numbers of the blocks that are on the device."""
        return [i for i, visitor in enumerate(self._visitors) if visitor.here is not None]

    def close(self) -> None:
        """Leave the model as it was, but for where its other parts are."""
        for hook in self._hooks:
            hook.remove()
        for number in self.present:
            self._leave(number)

    def _before(self, number: int, *_: Any) -> None:
        count = len(self._visitors)
        wanted = [(number + i) % count for i in range(min(self.ahead + 1, count))]
        for other in self.present:
            if other not in wanted:  # a cache went on elsewhere
                self._leave(other)
        for coming in wanted:
            if self._visitors[coming].here is None:
                self._fetch(coming)
        self.most = max(self.most, len(self.present))
        visitor = self._visitors[number]
        if visitor.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(visitor.arrived)
        for (held, name, host), value in zip(visitor.places, visitor.here or [], strict=True):
            held[name] = _like(host, value)

    def _after(self, number: int, *_: Any) -> None:
        self._leave(number)

    def _fetch(self, number: int) -> None:
        """Begin to copy a block. Its memory is that of blocks which left, so the copies wait until
        all that was asked of those before is done."""
        visitor = self._visitors[number]
        self.fetched += 1
        if self._side is None:
            visitor.here = [_copy(host, self.device) for *_, host in visitor.places]
            return
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            visitor.here = [_copy(host, self.device) for *_, host in visitor.places]
            visitor.arrived = self._side.record_event()

    def _leave(self, number: int) -> None:
        visitor = self._visitors[number]
        for held, name, host in visitor.places:
            held[name] = host
        visitor.here = visitor.arrived = None


def _tensors(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """A module's own parameters and buffers, with what holds them."""
    both: list[dict[str, Any]] = [module._parameters, module._buffers]
    return [(held, k, v) for held in both for k, v in held.items() if v is not None]


def _copy(host: Tensor, device: torch.device) -> Tensor:
    value = host.detach()
    return value.clone() if device.type == "cpu" else value.to(device, non_blocking=True)


def _like(old: Tensor, value: Tensor) -> Tensor:
    """A parameter in a parameter's place."""
    if not isinstance(old, nn.Parameter):
        return value
    return nn.Parameter(value, requires_grad=old.requires_grad)


def visit(module: nn.Module, method: str, device: torch.device) -> None:
    """Let a module be on the device only while one of its methods runs."""
    inner: Callable[..., Any] = getattr(module, method)

    def there(*args: Any, **options: Any) -> Any:
        module.to(device)
        try:
            return inner(*args, **options)
        finally:
            module.to("cpu")

    setattr(module, method, there)
