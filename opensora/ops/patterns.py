"""Who sees whom in attention, where a tensor of booleans would say it badly.

`Frames` is an order between frames: causal, a window, or both. `Packed` is several sequences that
lie one after the other. Both are small, hold no tensors of their own, and every backend of
`opensora.ops.backends` that takes them gives what the dense mask of `visible` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["none", "keys", "frames", "packed"]


@dataclass(frozen=True)
class Frames:
    """Tokens see whole frames near their own; the default is the order of time.

    With size=1 a frame is a token, which gives causal and sliding-window attention of sequences.

    Attributes:
        size: tokens of a frame, in queries as in keys.
        before: frames seen before one's own; None sees all of them.
        after: frames seen after one's own; None sees all of them.
        first: number of the queries' first frame, counted in the keys'; more than 0 where earlier
            keys come from a cache.
    """

    size: int
    before: int | None = None
    after: int | None = 0
    first: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.first < 0 or (self.before or 0) < 0 or (self.after or 0) < 0:
            raise ValueError(f"{self}: size is at least 1, and before, after and first at least 0")

    def span(self, frame: int, num_keys: int) -> tuple[int, int]:
        """The keys [start, stop) that queries of a frame (counted in the keys') see."""
        begin = 0 if self.before is None else max(0, frame - self.before) * self.size
        end = num_keys if self.after is None else (frame + self.after + 1) * self.size
        return min(begin, num_keys), min(end, num_keys)

    def check(self, num_queries: int, num_keys: int) -> None:
        """
        Raises:
            ValueError: some query would see no key.
        """
        if not num_queries:
            return
        last = self.first + (num_queries - 1) // self.size
        start, stop = self.span(last, num_keys)
        if start >= stop:
            raise ValueError(
                f"{self}: queries of frame {last} see no key, since there are {num_keys} keys; "
                "give them keys of frames that they may see"
            )


@dataclass(frozen=True)
class Packed:
    """Sequences one after the other in a batch of one; each attends to its own keys.

    Attributes:
        queries: tokens of each sequence; 0 is a sequence that asks nothing.
        keys: keys of each; None where they are the queries' own.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...] | None = None
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        pairs = zip(self.queries, self.key_lengths, strict=False)
        uneven = len(self.queries) != len(self.key_lengths)
        if (
            uneven
            or not any(self.queries)
            or any(q < 0 or k < 0 or (q and not k) for q, k in pairs)
        ):
            raise ValueError(
                f"queries {self.queries} and keys {self.keys} are lengths of the same sequences, "
                "at least one of them with queries, and those that have queries have keys"
            )

    @property
    def key_lengths(self) -> tuple[int, ...]:
        return self.queries if self.keys is None else self.keys

    def check(self, q: Tensor, k: Tensor) -> None:
        """
        Raises:
            ValueError: the tensors are no such batch.
        """
        found, wanted = (q.shape[1], k.shape[1]), (sum(self.queries), sum(self.key_lengths))
        if q.shape[0] != 1 or found != wanted:
            raise ValueError(
                f"packed sequences of {wanted[0]} queries and {wanted[1]} keys are a batch of 1 "
                f"with that many; found {q.shape[0]} with {found[0]} and {found[1]}"
            )

    def offsets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """int32 (sequences + 1,): where the queries and the keys of each begin, and the end."""
        return self.kept(("offsets", device), lambda: self._offsets(device))

    def _offsets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        found = [
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
            for lengths in (self.queries, self.key_lengths)
        ]
        return found[0], found[1]

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What a backend derives from the lengths, made once: many layers ask for the same."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


Pattern = Tensor | Frames | Packed | None


def kind_of(mask: Pattern) -> Kind:
    """What sort of pattern it is."""
    if mask is None:
        return "none"
    if isinstance(mask, Tensor):
        return "keys"
    return "frames" if isinstance(mask, Frames) else "packed"


def visible(
    mask: Pattern, num_queries: int, num_keys: int, *, causal: bool, device: torch.device
) -> Tensor | None:
    """The pattern written out: bool, broadcastable to (B, K, L, S), True where a key is seen.

    None where everything is.
    """
    rows = torch.arange(num_queries, device=device)[:, None]
    columns = torch.arange(num_keys, device=device)[None]
    if mask is None:
        return columns <= rows if causal else None
    if isinstance(mask, Frames):
        ahead = columns // mask.size - (rows // mask.size + mask.first)  # L S
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if mask.before is not None:
            seen &= ahead >= -mask.before
        if mask.after is not None:
            seen &= ahead <= mask.after
        return seen
    if not isinstance(mask, Packed):
        return mask[:, None, None, :]
    q_start, k_start = (offsets.long() for offsets in mask.offsets(device))
    of_query = torch.searchsorted(q_start, rows, right=True)  # L 1
    of_key = torch.searchsorted(k_start, columns, right=True)  # 1 S
    same = of_query == of_key
    return same & (columns <= rows) if causal else same
