"""Decoded frames a second of `read_clip` beside a bare PyAV loop on the same file, as JSON.

The bare loop opens the file, decodes, converts to RGB and stacks the frames into one array: the
least that a reader on PyAV does for a clip; both decode with as many threads and convert with one.
They take turns and the best of the rounds counts, so that other work disturbs both alike.

    python tools/bench/decode.py [--video FILE] [--threads 1 2] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np

from opensora.media.probe import probe
from opensora.media.read import read_clip
from opensora.media.write import write_video

NUM_CLIPS, CLIP_FRAMES, CLIP_FPS = 12, 16, 8
Job = Callable[[Path, int], int]
Rates = tuple[float, float]


def generate(path: Path, *, num_frames: int = 240, size: int = 512) -> Path:
    """Ten seconds at 24 fps of two textures that drift across each other."""
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    back, front = (np.kron(c, np.ones((16, 16, 1), np.uint8)) for c in cells)
    middle = slice(size // 4, -size // 4)

    def frames() -> Iterator[np.ndarray]:
        for index in range(num_frames):
            frame = back[index:, index // 2 :][:size, :size].copy()
            frame[middle, middle] = front[index // 3 :, 255 - index :][: size // 2, : size // 2]
            yield frame

    return write_video(path, frames(), fps=24, crf=23)


def bare_loop(path: Path, threads: int) -> int:
    """Decode everything into one array, as plainly as PyAV allows; the number of frames."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        assert stream is not None
        stream.codec_context.thread_count = threads
        stream.codec_context.thread_type = "AUTO" if threads > 1 else "NONE"
        frames = container.decode(stream)
        return len(np.stack([frame.to_ndarray(format="rgb24", threads=1) for frame in frames]))


def whole_file(path: Path, threads: int) -> int:
    """Read everything with `read_clip`; the number of frames."""
    return len(read_clip(path, threads=threads).frames)


def random_clips(path: Path, threads: int) -> int:
    """Read short clips from places all over the file, as training does; the number of frames."""
    latest = probe(path).duration - CLIP_FRAMES / CLIP_FPS
    for start in np.random.default_rng(0).uniform(0, latest, NUM_CLIPS):
        read_clip(path, num_frames=CLIP_FRAMES, fps=CLIP_FPS, start=float(start), threads=threads)
    return NUM_CLIPS * CLIP_FRAMES


def best_rates(jobs: Sequence[Job], path: Path, threads: int, rounds: int) -> list[Rates]:
    """Each job's best frames a second of wall clock and of CPU time, taking turns `rounds` times.

    CPU time of all threads together is what a loaded machine can still compare.
    """
    best = [(0.0, 0.0)] * len(jobs)
    for _ in range(rounds):
        for index, job in enumerate(jobs):
            wall, cpu = time.perf_counter(), time.process_time()
            count = job(path, threads)
            rates = count / (time.perf_counter() - wall), count / (time.process_time() - cpu)
            best[index] = max(best[index][0], rates[0]), max(best[index][1], rates[1])
    return best


def measure(path: Path, threads: int, rounds: int) -> dict[str, float]:
    """One entry of the report."""
    bare, whole = best_rates([bare_loop, whole_file], path, threads, rounds)
    (clips,) = best_rates([random_clips], path, threads, max(1, rounds // 3))
    return {
        "threads": threads,
        "bare_frames_per_second": round(bare[0], 1),
        "read_clip_frames_per_second": round(whole[0], 1),
        "ratio": round(whole[0] / bare[0], 3),
        "ratio_of_cpu_time": round(whole[1] / bare[1], 3),
        "random_clip_frames_per_second": round(clips[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--video", type=Path, help="a file to decode (default: a generated one)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.video or generate(Path(folder) / "generated.mp4")
        results = [measure(path, count, arguments.rounds) for count in arguments.threads]
    report = {
        "benchmark": "decode",
        "video": str(arguments.video or "generated: 240 frames of 512x512, h264"),
        "machine": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "pyav": av.__version__,
        "results": results,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
