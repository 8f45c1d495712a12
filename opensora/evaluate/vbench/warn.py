"""What a reader of the scores must know: still pictures, subsets, what is missing or unreadable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opensora.evaluate.vbench.config import JudgingConfig, VBenchConfig
from opensora.evaluate.vbench.judge import LENGTH, MOTION, Judgement, Task
from opensora.evaluate.vbench.prompts import READ_SAMPLES, prompt_of
from opensora.evaluate.vbench.videos import Collection

STILL_MOTION = 0.5
"""A video whose fastest blocks move less than this many pixels a frame, at 256, is a still."""

STILL_SHARE, LOW_DYNAMIC = 0.9, 0.05
LONG = 5.0
"""Seconds from which on a video is one of VBench-Long."""


def warnings(
    config: JudgingConfig,
    collection: Collection,
    judged: Judgement,
    scores: Mapping[str, Any],
    tasks: Mapping[str, Sequence[Task]],
    *,
    unfiltered: bool,
) -> list[str]:
    """One sentence for each thing, the most important first.

    Args:
        scores: the groups found.
        unfiltered: whether temporal_flickering was measured without a static filter.
    """
    found = [*_still(judged, scores, tasks), *_long(judged), *_subset(config)]
    if unfiltered:
        found.append(
            "temporal_flickering was measured without the static filter, so motion counts as "
            "flicker: give static_list, or raft-things.pth in weights_dir"
        )
    elif config.mode == "standard":
        found += _few_static(config, tasks)
    if collection.missing:
        found.append(
            f"{len(collection.missing)} videos are missing, '{collection.missing[0]}' for one"
            + _more_for_flickering(config, collection)
        )
    if collection.strays:
        name, nearest = next(iter(collection.strays.items()))
        hint = f" (nearest prompt: '{nearest}')" if nearest else ""
        found.append(f"{len(collection.strays)} files belong to no prompt, '{name}' for one{hint}")
    if judged.unusable:
        file, _, reason = judged.unusable[0]
        found.append(f"{len(judged.unusable)} measures could not be taken; '{file}': {reason}")
    return found


def _still(
    judged: Judgement, scores: Mapping[str, Any], tasks: Mapping[str, Sequence[Task]]
) -> list[str]:
    """Quality prizes a picture that does not move: a perfectly still one has about 0.79."""
    trap = "a still picture has a Quality of about 0.79, so Quality alone says nothing here"
    dynamic = scores.get("vbench", {}).get("dynamic_degree")
    if dynamic is not None and dynamic["mean"] < LOW_DYNAMIC:
        return [f"still pictures: dynamic_degree is {dynamic['mean']:.2f}; {trap}"]
    # Prompts for flickering ask for stillness; they say nothing about the model.
    asked = {
        task.video.path
        for name, of in tasks.items()
        if name != "temporal_flickering"
        for task in of
    }
    moves = [r.measured.value for r in judged.rows.get(MOTION, ()) if r.video.path in asked]
    if moves and np.mean(np.array(moves) < STILL_MOTION) >= STILL_SHARE:
        share = np.mean(np.array(moves) < STILL_MOTION)
        return [f"still pictures: in {share:.0%} of the videos nothing moves; {trap}"]
    return []


def _long(judged: Judgement) -> list[str]:
    rows = judged.rows.get(LENGTH, [])
    long = [row for row in rows if row.measured.value >= LONG]
    if not long:
        return []
    name, seconds = long[0].video.path.name, long[0].measured.value
    return [
        f"{len(long)} of {len(rows)} videos last {LONG:g} seconds or more "
        f"('{name}' {seconds:.1f}): published scores of such videos are VBench-Long's, which cuts "
        "them into clips; do not compare these with them"
    ]


def _subset(config: JudgingConfig) -> list[str]:
    parts = []
    if config.mode == "custom":
        parts.append("videos of any names")
    if config.prompts is not None:
        parts.append(f"the prompts of {config.prompts}")
    if isinstance(config, VBenchConfig) and config.rewritten is not None:
        parts.append("rewritten prompts")
    if config.num_prompts is not None:
        parts.append(f"{config.num_prompts} prompts a dimension")
    if config.samples_per_prompt < READ_SAMPLES:
        parts.append(f"{config.samples_per_prompt} of {READ_SAMPLES} samples a prompt")
    if not parts:
        return []
    if parts == ["rewritten prompts"]:
        return ["prompts were rewritten: compare with published scores of rewritten prompts only"]
    return [f"not VBench's protocol ({', '.join(parts)}): do not compare with published scores"]


def _more_for_flickering(config: JudgingConfig, collection: Collection) -> str:
    """What to set where a folder has some samples of each prompt, but no more for flickering."""
    if not isinstance(config, VBenchConfig):
        return ""
    least = config.samples_per_prompt
    numbered = [prompt_of(name) for name in collection.missing]
    beyond = [prompt for prompt, number in numbered if number is not None and number >= least]
    there = [v.sample for prompt in set(beyond) for v in collection.videos.get(prompt, ())]
    have = max([least, *(1 + number for number in there if number is not None)])
    if not beyond or have >= config.flicker_samples:
        return ""
    return (
        f"; {len(beyond)} of them are more samples for temporal_flickering, of which the folder "
        f"has {have} a prompt: set flicker_samples={have}"
    )


def _few_static(config: JudgingConfig, tasks: Mapping[str, Sequence[Task]]) -> list[str]:
    """Prompts of which the filter left fewer videos than the protocol reads."""
    if "temporal_flickering" not in tasks:
        return []
    counts: dict[str, int] = {}
    for task in tasks["temporal_flickering"]:
        counts[task.video.prompt] = counts.get(task.video.prompt, 0) + 1
    few = [prompt for prompt, count in counts.items() if count < config.samples_per_prompt]
    if not few:
        return []
    return [
        f"{len(few)} prompts of temporal_flickering have fewer than {config.samples_per_prompt} "
        f"static videos, '{few[0]}' for one"
    ]
