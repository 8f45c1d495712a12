"""What of a module's work can be done piece by piece.

A module that offers `stages` says so; `opensora.engine.tiles` makes use of it to save memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A part of the tokens that needs none of the others.

    Attributes:
        index: where it is in the tokens, and its result in the result.
        run: (tokens[index], what else the module is given) -> result[index].
    """

    index: tuple[slice, ...]
    run: Callable[..., Tensor]


Stage = list[Piece]


class Divisible(Protocol):
    """A module whose forward(tokens, *others) is stages one after the other."""

    def stages(
        self, forward: Callable[..., Tensor], tiles: int, tokens: Tensor, *others: Any
    ) -> list[Stage]:
        """Stages of about `tiles` pieces each; the input of one is the output of the one before.

        Args:
            forward: stands for the module's own, such as a compiled one.
        """
        ...


def cuts(length: int, tiles: int, *, unit: int = 1) -> list[slice]:
    """`length` in `tiles` parts, as even as can be in whole units; one part where there are less.

    Args:
        unit: length is a multiple of it.
    """
    count = length // unit
    number = max(1, min(tiles, count))
    edges = [unit * (count * k // number) for k in range(number + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]
