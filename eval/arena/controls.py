"""What the judge says of videos whose quality is known: the controls of docs/arena.md.

    python eval/arena/controls.py --scenes 200

Prints a Markdown table, one row a control: right videos and harmless damage must score 1, wrong,
frozen, reversed, shuffled, blurred and empty videos must not.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from opensora.arena.draw import render
from opensora.arena.palette import COLOURS, GROUND
from opensora.arena.scenes import SceneConfig, sample, varied
from opensora.arena.score import aggregate, score
from opensora.arena.truth import Scene

Videos = list[np.ndarray]
Summary = dict[str, dict[str, float]]

COLUMNS = (
    "count",
    "colour",
    "shape",
    "binding",
    "permanence",
    "direction",
    "motion",
    "speed_error",
    "newton_residual",
    "success",
)


def controls(
    config: SceneConfig, *, num_scenes: int, seed: int = 0, folder: Path | None = None
) -> dict[str, Summary]:
    """The aggregated scores of every control over the same scenes.

    Args:
        folder: where the codec control writes its files; a temporary folder by default.
    """
    scenes = [sample(config, seed, index) for index in range(num_scenes)]
    videos = [render(scene) for scene in scenes]
    results = {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, change in _changes(Path(scratch), config.fps, seed).items():
            results[name] = _summary(scenes, change(videos), config)
    shifted = [scenes[(index + 1) % num_scenes] for index in range(num_scenes)]
    results["wrong prompts"] = _summary(shifted, videos, config)
    return results


def table(results: dict[str, Summary], columns: Sequence[str] = COLUMNS) -> str:
    """The results as Markdown; '-' where a metric does not apply."""
    rows = [f"| video | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, summary in results.items():
        cells = [f"{summary[c]['mean']:.3f}" if c in summary else "-" for c in columns]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def blurred(video: np.ndarray, sigma: float) -> np.ndarray:
    """A video under Gaussian blur in space: float32, same shape."""
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    out = video.astype(np.float32)
    for axis in (1, 2):
        width = [(reach, reach) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(out, width, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis)
        out = windows @ kernel
    return out


def _summary(scenes: Sequence[Scene], videos: Videos, config: SceneConfig) -> Summary:
    return aggregate(
        [
            score(v, s.promise, fps=s.fps, truth=s, speed=config.speed, radius=config.radius)
            for v, s in zip(videos, scenes, strict=True)
        ]
    )


def _changes(folder: Path, fps: float, seed: int) -> dict[str, Callable[[Videos], Videos]]:
    """What each control does to the rendered videos."""
    chance = np.random.default_rng(seed)

    def rounded(video: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(video), 0, 255).astype(np.uint8)

    def noisy(video: np.ndarray) -> np.ndarray:
        return rounded(blurred(video, 1.2) + chance.normal(0, 12, video.shape))

    def shuffled(video: np.ndarray) -> np.ndarray:
        return video[chance.permutation(len(video))]

    def each(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Videos], Videos]:
        return lambda videos: [change(video) for video in videos]

    def mean(videos: Videos) -> Videos:
        return [rounded(np.mean(videos, 0))] * len(videos)

    return {
        "ground truth": each(lambda v: v),
        "H.264 at crf 30": lambda videos: [_coded(v, folder, fps) for v in videos],
        "blur 1.2 + noise 12": each(noisy),
        "blur 3": each(lambda v: rounded(blurred(v, 3))),
        "first frame repeated": each(lambda v: np.repeat(v[:1], len(v), 0)),
        "time reversed": each(lambda v: v[::-1]),
        "frames shuffled": each(shuffled),
        "mean of all videos": mean,
        "noise": each(lambda v: chance.integers(0, 256, v.shape, np.uint8)),
        "empty ground": each(lambda v: np.broadcast_to(np.array(GROUND, np.uint8), v.shape).copy()),
        "a disc of every colour": each(_discs),
    }


def _coded(video: np.ndarray, folder: Path, fps: float) -> np.ndarray:
    from opensora.media.read import read_clip
    from opensora.media.write import write_video

    path = write_video(folder / "coded.mp4", video, fps=fps, crf=30)
    return read_clip(path).frames


def _discs(video: np.ndarray) -> np.ndarray:
    """What a model would paint that hopes for a lucky match."""
    _, height, width, _ = video.shape
    out = np.empty_like(video)
    out[:] = GROUND
    y, x = np.mgrid[:height, :width] + 0.5
    cell = np.array([width / 3, height / 3])
    for number, colour in enumerate(COLOURS.values()):
        centre = (np.array([number % 3, number // 3]) + 0.5) * cell
        inside = np.hypot(x - centre[0], y - centre[1]) <= 0.4 * cell.min()
        out[:, inside] = colour
    return out


def main() -> None:
    """Print both tables and how long they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    plain = SceneConfig(num_objects={1: 0.5, 2: 0.5}, speed_words=0.5)
    for title, config in (("straight motion", plain), ("everything", varied())):
        start = time.perf_counter()
        results = controls(config, num_scenes=arguments.scenes, seed=arguments.seed)
        seconds = time.perf_counter() - start
        print(f"\n{title}: {arguments.scenes} scenes, {seconds:.0f} s\n\n{table(results)}")


if __name__ == "__main__":
    main()
