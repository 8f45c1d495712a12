"""Published VBench scores of public models: anchors of a table, and proof of the totals.

Percentages as printed, from Table 1 of Zhang et al. 2025, FlashVideo (arXiv 2502.05179), which
quotes the leaderboard. Two of its rows are left out: Open-Sora 1.2, which repeats LTX-Video's
figures, and FlashVideo at 8 fps, whose totals do not follow from its dimensions.
"""

from __future__ import annotations

DIMENSIONS = (
    *("subject_consistency", "background_consistency", "temporal_flickering"),
    *("motion_smoothness", "dynamic_degree", "aesthetic_quality", "imaging_quality"),
    *("object_class", "multiple_objects", "human_action", "color", "spatial_relationship"),
    *("scene", "appearance_style", "temporal_style", "overall_consistency"),
)
"""The columns, in VBench's order."""

# fmt: off
PUBLISHED: dict[str, tuple[tuple[float, float, float], tuple[float, ...]]] = {
    "Vchitect-2.0 (VEnhancer)": ((82.24, 83.54, 77.06), (
        96.83, 96.66, 98.57, 98.98, 63.89, 60.41, 65.35,
        86.61, 68.84, 97.20, 87.04, 57.55, 56.57, 23.73, 25.01, 27.57)),
    "CogVideoX-1.5": ((82.17, 82.78, 79.76), (
        96.87, 97.35, 98.88, 98.31, 50.93, 62.79, 65.02,
        87.47, 69.65, 97.20, 87.55, 80.25, 52.91, 24.89, 25.19, 27.30)),
    "CogVideoX-5B": ((81.61, 82.75, 77.04), (
        96.23, 96.52, 98.66, 96.92, 70.97, 61.98, 62.90,
        85.23, 62.11, 99.40, 82.81, 66.35, 53.20, 24.91, 25.38, 27.59)),
    "CogVideoX-2B": ((81.57, 82.51, 77.79), (
        96.42, 96.53, 98.45, 97.76, 58.33, 61.47, 65.60,
        87.81, 69.35, 97.00, 86.87, 54.64, 57.51, 24.93, 25.56, 28.01)),
    "Mochi-1": ((80.13, 82.64, 70.08), (
        96.99, 97.28, 99.40, 99.02, 61.85, 56.94, 60.64,
        86.51, 50.47, 94.60, 79.73, 69.24, 36.99, 20.33, 23.65, 25.15)),
    "LTX-Video": ((80.00, 82.30, 70.79), (
        96.56, 97.20, 99.34, 98.96, 54.35, 59.81, 60.28,
        83.45, 45.43, 92.80, 81.45, 65.43, 51.07, 21.47, 22.62, 25.19)),
    "Open-Sora-Plan 1.1": ((78.00, 80.91, 66.38), (
        95.73, 96.73, 99.03, 98.28, 47.72, 56.85, 62.28,
        76.30, 40.35, 86.80, 89.19, 53.11, 27.17, 22.90, 23.87, 26.52)),
    "FlashVideo (24 fps)": ((82.99, 83.35, 81.56), (
        97.19, 97.09, 98.52, 98.89, 56.88, 62.11, 65.40,
        88.38, 78.93, 99.40, 84.84, 82.16, 57.43, 24.36, 25.26, 27.59)),
}
# fmt: on
"""Model -> (Total, Quality, Semantic), dimensions; all in percent."""


def raw_of(model: str) -> dict[str, float]:
    """Dimension -> raw score of a published model, between 0 and 1."""
    return {n: p / 100 for n, p in zip(DIMENSIONS, PUBLISHED[model][1], strict=True)}
