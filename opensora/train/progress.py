"""How far a run is: the few numbers that a checkpoint carries beside tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class Progress:
    """Counts since the start of the run, over all its attempts.

    Attributes:
        step: updates tried; the next one has this number, from 0.
        tokens: that the model saw.
        seconds: spent on steps.
        replaced: samples that stood in for unreadable ones.
        shape: num_frames, height, width and fps of the largest clips so far.
        finished: whether the measurements after the last step are done.
    """

    step: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    replaced: float = 0.0
    shape: dict[str, Any] = field(default_factory=dict)
    finished: bool = False

    def saw(self, shape: dict[str, Any]) -> None:
        """Keep the larger of two shapes, in pixels of a clip."""
        if not self.shape or _pixels(shape) > _pixels(self.shape):
            self.shape = shape

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Progress:
        """What `state` gave, out of a larger tree."""
        return cls(**{f.name: state[f.name] for f in fields(cls)})


def _pixels(shape: dict[str, Any]) -> int:
    return shape["num_frames"] * shape["height"] * shape["width"]
