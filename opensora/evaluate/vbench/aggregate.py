"""VBench's totals: normalise each dimension, weigh, average.

    normalised(d) = (raw(d) - low(d)) / (high(d) - low(d))        not clipped
    Quality  = sum of weight(d) normalised(d) / sum of weights    over the 7 quality dimensions
    Semantic = the same over the 9 semantic dimensions
    Total    = (4 Quality + Semantic) / 5

Constants and formulas were checked against scripts/constant.py, scripts/cal_final_score.py and
scripts/cal_i2v_final_score.py of Vchitect/VBench (45e79ec): the order of every operation is theirs,
so the digits are too. A total exists only when all of its dimensions do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opensora.evaluate.vbench.prompts import Version


@dataclass(frozen=True)
class Scale:
    """How a dimension enters a total: the raw values of 0 and 1, and its weight."""

    low: float = 0.0
    high: float = 1.0
    weight: float = 1


QUALITY = {
    "subject_consistency": Scale(0.1462, 1.0),
    "background_consistency": Scale(0.2615, 1.0),
    "temporal_flickering": Scale(0.6293, 1.0),
    "motion_smoothness": Scale(0.706, 0.9975),
    "aesthetic_quality": Scale(),
    "imaging_quality": Scale(),
    "dynamic_degree": Scale(weight=0.5),
}
SEMANTIC = {
    "object_class": Scale(),
    "multiple_objects": Scale(),
    "human_action": Scale(),
    "color": Scale(),
    "spatial_relationship": Scale(),
    "scene": Scale(0.0, 0.8222),
    "appearance_style": Scale(0.0009, 0.2855),
    "temporal_style": Scale(0.0, 0.364),
    "overall_consistency": Scale(0.0, 0.364),
}
I2V = {
    "camera_motion": Scale(weight=0.1),
    "i2v_subject": Scale(0.1462, 1.0),
    "i2v_background": Scale(0.2615, 1.0),
}
I2V_QUALITY = {
    "subject_consistency": Scale(0.1462, 1.0),
    "background_consistency": Scale(0.2615, 1.0),
    "motion_smoothness": Scale(0.7060, 0.9975),
    "dynamic_degree": Scale(weight=0.5),
    "aesthetic_quality": Scale(),
    "imaging_quality": Scale(),
}

PARTS: dict[Version, dict[str, tuple[dict[str, Scale], float]]] = {
    "v1": {"quality": (QUALITY, 4), "semantic": (SEMANTIC, 1)},
    "i2v": {"quality": (I2V_QUALITY, 1.0), "i2v": (I2V, 1.0)},
}
"""Version -> part of the total -> its dimensions, and its weight in the total."""


def normalised(raw: Any, scale: Scale) -> Any:
    """A raw score, or an array of them, between the extremes that VBench measured; not clipped."""
    return (raw - scale.low) / (scale.high - scale.low)


def part(raw: Mapping[str, Any], scales: Mapping[str, Scale]) -> Any:
    """The weighted mean of normalised dimensions, all of which must be there."""
    weighed = [normalised(raw[name], scale) * scale.weight for name, scale in scales.items()]
    return sum(weighed) / sum([scale.weight for scale in scales.values()])


def totals(raw: Mapping[str, Any], version: Version = "v1") -> dict[str, Any]:
    """Quality, Semantic (or I2V) and Total, as far as their dimensions are there.

    Args:
        raw: dimension -> raw score between 0 and 1, a float or an array of one shape; other names
            are left out.

    Returns:
        A dict that may be empty; 'total' only when every dimension of the version is there.
    """
    parts = PARTS[version]
    found = {
        name: part(raw, scales)
        for name, (scales, _) in parts.items()
        if all(dimension in raw for dimension in scales)
    }
    if len(found) == len(parts):
        weights = {name: weight for name, (_, weight) in parts.items()}
        weighed = sum(found[name] * weight for name, weight in weights.items())
        found["total"] = weighed / sum(weights.values())
    return found


def upstream_totals(raw: Mapping[str, float], version: Version = "v1") -> dict[str, float]:
    """What VBench's script prints: a missing dimension counts as raw 0.

    For comparison with figures that were made that way; nothing here reports them.
    """
    names = [name for scales, _ in PARTS[version].values() for name in scales]
    return totals({name: raw.get(name, 0) for name in names}, version)


def missing(raw: Mapping[str, Any], version: Version = "v1") -> list[str]:
    """The dimensions of the total that are not there."""
    return [n for scales, _ in PARTS[version].values() for n in scales if n not in raw]
