"""What clients see of jobs and of the model: JSON in the form of OpenAI's video API, and more.

`command` makes the same video on the command line; it is quoted for a shell and never run here.
"""

from __future__ import annotations

import shlex
from typing import Any

from opensora.infer.pipeline import VideoPipeline
from opensora.serve import jobs
from opensora.serve.config import Bounds
from opensora.serve.jobs import Job
from opensora.serve.request import multiples


def video(job: Job, *, model: str, checkpoint: str, position: int | None) -> dict[str, Any]:
    """A job.

    Args:
        model, checkpoint: that are served; a completed job keeps those that drew it.
        position: how many others are drawn first, where it waits.
    """
    asked, shape = job.asked, job.asked.shape
    done = job.status == jobs.COMPLETED
    return {
        "id": job.id,
        "object": "video",
        "model": job.model or model,
        "status": job.status,
        "progress": 100 if done else 100 * job.step // (asked.steps + 1),
        "step": asked.steps if done else job.step,
        "steps": asked.steps,
        "queue_position": position,
        "created_at": job.created_at,
        "completed_at": job.completed_at,
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "seed": asked.seed,
        "guidance_scale": asked.guidance_scale,
        "size": f"{shape.width}x{shape.height}",
        "num_frames": shape.num_frames,
        "fps": shape.fps,
        "seconds": f"{shape.num_frames / shape.fps:.6g}",
        "has_input_reference": job.has_reference,
        "weights": job.weights,
        "command": command(job, job.checkpoint or checkpoint),
        "error": job.error,
    }


def command(job: Job, checkpoint: str) -> str:
    """`opensora sample ...` that draws the same video, as one line for a POSIX shell."""
    asked, shape = job.asked, job.asked.shape
    words = ["opensora", "sample", "--seed", asked.seed, "--steps", asked.steps]
    words += ["--guidance", asked.guidance_scale, "--frames", shape.num_frames]
    words += ["--width", shape.width, "--height", shape.height, "--fps", shape.fps]
    if asked.negative_prompt:
        words.append(f"--negative={asked.negative_prompt}")
    if shape.num_frames == 1:  # of which the command line makes a picture
        words += ["--format", "mp4"]
    if job.has_reference:
        words += ["--first", jobs.REFERENCE]
    words += ["--", checkpoint, asked.prompt]
    return shlex.join(str(word) for word in words)


def model_card(
    pipeline: VideoPipeline, *, name: str, created: int, bounds: Bounds, checkpoint: str
) -> dict[str, Any]:
    """The model, what it draws by default, and the bounds of a request."""
    shape = pipeline.shape
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "opensora",
        "checkpoint": checkpoint,
        "weights": pipeline.fingerprint,
        "defaults": {
            "size": f"{shape.width}x{shape.height}",
            "num_frames": shape.num_frames,
            "fps": shape.fps,
            "steps": 30,
            "guidance_scale": 3.0,
        },
        "multiples": multiples(pipeline),
        "bounds": {
            "prompt": bounds.prompt,
            "steps": bounds.steps,
            "guidance_scale": bounds.guidance,
            "num_frames": bounds.num_frames,
            "pixels": bounds.num_pixels,
            "side": bounds.side,
            "work": bounds.work,
            "fps": bounds.fps,
        },
    }
