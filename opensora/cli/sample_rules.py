"""What cannot be asked for together: an option that would do nothing is refused with the reason."""

from __future__ import annotations

from opensora.cli.asked import Asked
from opensora.errors import UsageError
from opensora.infer.settings import SamplingConfig


def refuse_unused(asked: Asked, sampling: SamplingConfig, ranks: int) -> None:
    """Refuse the first option that the others leave nothing to do.

    Args:
        ranks: that draw.

    Raises:
        UsageError: with the option, the reason, and what to do.
    """
    for applies, message in (
        *_of_frames(asked),
        *_of_length(asked, sampling),
        *_of_guidance(asked, sampling),
        *_of_ranks(asked, sampling, ranks),
    ):
        if applies:
            raise UsageError(message)


Rules = list[tuple[bool, str]]


def _of_frames(asked: Asked) -> Rules:
    frames, words = asked.frames, asked.words
    return [
        (
            frames.strength is not None and frames.edit is None,
            "--strength says how much to change a video: give one with --edit",
        ),
        (
            frames.num_given is not None and not frames.has_video,
            "--given counts frames of a video: give one with --first or --last",
        ),
        (
            bool(asked.refine_model) and not asked.refine,
            "--refine-model names a model of an API: give its URL with --refine",
        ),
        (
            frames.drawn and bool(words.reference),
            "--picture-first draws the first picture: leave out --reference",
        ),
    ]


def _of_length(asked: Asked, sampling: SamplingConfig) -> Rules:
    frames, long = asked.frames, asked.long
    later = [
        name
        for name, value in (
            ("--last", frames.last),
            ("--loop", frames.loop),
            ("--keyframe", frames.keyframes),
            ("--edit", frames.edit),
        )
        if value
    ]
    given = frames.first or asked.words.reference
    pieces = asked.savings.get("decode", {})
    return [
        (
            asked.overlap is not None and long != "windows",
            "--overlap is of windows: say --long windows, or leave it out",
        ),
        (
            asked.batch_size is not None and long is not None,
            "--batch-size: long videos are drawn one at a time, leave it out",
        ),
        (
            frames.drawn and long is not None,
            "--picture-first is of short videos: draw the picture, then give it with --first",
        ),
        (
            bool(later) and long == "windows",
            f"{', '.join(later)} would be of the first window only: say the window and the frames "
            "with --reference and --mask-strategy",
        ),
        (
            bool(later or given) and long == "pyramid",
            "--long pyramid takes no given frames: use --long windows",
        ),
        (
            long == "pyramid" and sampling.schedule.kind != "full_sequence",
            f"--long pyramid has a schedule of its own: leave out schedule.kind="
            f"{sampling.schedule.kind}, or use --long windows",
        ),
        (
            long == "pyramid" and (pieces.get("tile") is True or pieces.get("chunk") is not None),
            "--long pyramid decodes as it goes: leave out --tile-vae and --decode-chunk, or use "
            "--long windows",
        ),
    ]


def _of_guidance(asked: Asked, sampling: SamplingConfig) -> Rules:
    guidance, weaker = sampling.guidance, asked.weaker is not None
    none = guidance.scale == 1
    return [
        (none and weaker, "--guide-with needs guidance: say a --guidance other than 1"),
        (
            bool(asked.negative_prompt) and (none or weaker),
            "--negative: nothing is guided away from a prompt with "
            + ("--guidance 1" if none else "--guide-with")
            + ", leave one of them out",
        ),
        (
            guidance.rescale > 0 and none and guidance.frames_scale == 1,
            "--rescale mends what guidance does: say a --guidance other than 1",
        ),
        (
            guidance.frames_ramp and guidance.frames_scale == 1,
            "guidance.frames_ramp needs a guidance.frames_scale other than 1",
        ),
        (
            isinstance(guidance.batched, bool)
            and ((none and guidance.frames_scale == 1) or weaker),
            "guidance.batched: there are no branches of one model to put together, leave it out",
        ),
    ]


def _of_ranks(asked: Asked, sampling: SamplingConfig, ranks: int) -> Rules:
    guidance, share = sampling.guidance, asked.share
    branches = 1 + (guidance.scale != 1) + (guidance.frames_scale != 1)
    several = share in ("guidance", "both") and ranks > 1
    dealt = 2 if share == "both" else ranks
    return [
        (
            share != "prompts" and ranks == 1,
            f"--share {share} needs several ranks: start them with torchrun --nproc-per-node",
        ),
        (
            several and branches < dealt,
            f"--share {share} on {ranks} ranks: guidance has {branches} branch"
            f"{'es' * (branches > 1)} here, so ranks would idle; use --share sequence, or say a "
            "--guidance other than 1",
        ),
        (
            several and isinstance(guidance.batched, bool),
            f"guidance.batched: --share {share} gives each rank its own branches, leave it out",
        ),
    ]
