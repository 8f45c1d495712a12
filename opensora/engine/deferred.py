"""Building a model that no rank could hold: its layers first, its first weights afterwards.

Inside `recording` a model is built on the meta device and what would have initialised it is noted.
`Recipe.pour` carries that out in the same order with the same random numbers, one tensor at a
time, and hands each to whoever keeps a part of it. So weights are bit for bit those of a model
that was built at once, on any number of ranks, and a rank never holds more than a few tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_OVERWRITES = ("uniform_", "normal_", "zero_", "fill_", "trunc_normal_")


@dataclass(frozen=True)
class _Step:
    """One call of an operator; `touched` are the storages of its tensors."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    touched: frozenset[int]
    overwrites: int | None


@dataclass
class Recipe:
    """How the tensors of a model that was built on the meta device come to their values.

    Attributes:
        steps: what the model's constructor called.
        random_state: of the CPU's default generator before it did.
        wanted: by storage, the names of parameters and buffers in it, and where they lie.
    """

    steps: list[_Step] = field(default_factory=list)
    random_state: Tensor = field(default_factory=torch.get_rng_state)
    wanted: dict[int, list[tuple[str, Tensor]]] = field(default_factory=dict)

    def serves(self, model: nn.Module) -> None:
        """Note what has to be computed, before anybody shards it.

        Args:
            model: as it came from `recording`.
        """
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            self.wanted.setdefault(_storage(value), []).append((name, value.detach()))

    def pour(self, keep: Callable[[str, Tensor], object]) -> None:
        """Compute every parameter and buffer as if the model had been built at once.

        Args:
            keep: takes a name and the whole tensor on the CPU; what it does not copy is gone.
        """
        last = {key: number for number, step in enumerate(self.steps) for key in step.touched}
        dead = self._dead()
        made: dict[int, Tensor] = {}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.set_rng_state(self.random_state)
            for number, step in enumerate(self.steps):
                self._run(step, made)
                done = {key for key in step.touched if last[key] == number}
                for key in done:
                    for name, like in self.wanted.get(key, ()):
                        keep(name, _view(made[key], like))
                for key in done | ({step.overwrites} if number in dead else set()):
                    made.pop(key, None)  # type: ignore[arg-type]

    def _dead(self) -> set[int]:
        """Steps whose result the next step on the same storage overwrites: only their random
        numbers count."""
        following: dict[int, _Step] = {}
        dead = set()
        for number in range(len(self.steps) - 1, -1, -1):
            step = self.steps[number]
            later = following.get(step.overwrites) if step.overwrites is not None else None
            if later is not None and later.overwrites == step.overwrites:
                dead.add(number)
            following.update(dict.fromkeys(step.touched, step))
        return dead

    def _run(self, step: _Step, made: dict[int, Tensor]) -> None:
        def real(value: Any) -> Any:
            if isinstance(value, torch.device):
                return torch.device("cpu")
            if not isinstance(value, Tensor):
                return value
            key = _storage(value)
            if key not in made:  # never written, or what was written does not count
                count = value.untyped_storage().nbytes() // value.element_size()
                made[key] = torch.empty(count, dtype=value.dtype)
            return _view(made[key], value)

        kwargs = {k: "cpu" if k == "device" else v for k, v in step.kwargs.items()}
        if step.call is torch.ops.aten.empty.memory_format:
            return  # room is made when something is written to it
        results = step.call(*tree_map(real, step.args), **tree_map(real, kwargs))
        for meta, value in zip(tree_leaves(step.result), tree_leaves(results), strict=True):
            if isinstance(meta, Tensor):
                made.setdefault(_storage(meta), value)


class _Recorder(TorchDispatchMode):
    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [v for v in tree_leaves((args, kwargs, result)) if isinstance(v, Tensor)]
        touched = frozenset(_storage(value) for value in tensors)
        name = func._schema.name.removeprefix("aten::")
        whole = name in _OVERWRITES and _is_whole(args[0])
        overwritten = _storage(args[0]) if whole else None
        self.recipe.steps.append(_Step(func, args, kwargs, result, touched, overwritten))
        return result


@contextmanager
def recording() -> Iterator[Recipe]:
    """Build models on the meta device inside the block; the recipe says how to fill them.

    Random numbers are those of the CPU's default generator from where it is now.
    """
    recipe = Recipe()
    with torch.device("meta"), _Recorder(recipe):
        yield recipe


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _is_whole(value: Tensor) -> bool:
    return value.numel() * value.element_size() == value.untyped_storage().nbytes()


def _view(made: Tensor, like: Tensor) -> Tensor:
    """The part of a storage that `like` is on the meta device."""
    return torch.as_strided(made, like.size(), like.stride(), like.storage_offset())
