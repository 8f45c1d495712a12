"""The dimensions in one table: what each needs, and how it is measured here.

Tier A needs no weights. Tier B has exact arithmetic here and weights of others. Tiers C and D
(D with detectron2 or Tag2Text) are left to an installed upstream package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from opensora.evaluate.vbench import measures, transforms, weights
from opensora.evaluate.vbench.measures import Measured
from opensora.evaluate.vbench.prompts import Version
from opensora.evaluate.vbench.tools import Tools
from opensora.evaluate.vbench.weights import Shelf, Weights
from opensora.media.picture import read_picture


@dataclass(frozen=True)
class Footage:
    """A decoded video and what its prompt says about a dimension.

    Attributes:
        frames: uint8 (F, H, W, 3).
        about: of the prompt's entry, such as {"appearance_style": "oil painting"}; for dimensions
            that take a picture {"picture": its path}.
    """

    frames: np.ndarray
    fps: float
    about: dict[str, Any]


Measure = Callable[[Footage, Tools], Measured]


@dataclass(frozen=True)
class Dimension:
    """One line of the table.

    Attributes:
        tier: A, B, C or D.
        measure: how it is measured here; None leaves it to the upstream package.
        weights: what `measure` reads.
        upstream: what upstream needs besides its package, for the message of a skipped dimension.
        by_prompt: whether the prompt or its notes decide the score, so that videos of any names
            cannot be judged.
        picture: whether `measure` reads the picture that the entry names.
    """

    tier: Literal["A", "B", "C", "D"]
    measure: Measure | None = None
    weights: tuple[Weights, ...] = ()
    upstream: str = ""
    by_prompt: bool = False
    picture: bool = False

    def lacking(self, shelf: Shelf, pictures: Path | None = None) -> str | None:
        """Why it cannot be measured here, in words; None where it can.

        Args:
            pictures: the folder of the benchmark's pictures.
        """
        if self.measure is None:
            return f"needs VBench's own package with {self.upstream}: set upstream.python"
        reasons = [reason for w in self.weights if (reason := shelf.lacking(w)) is not None]
        if self.picture and pictures is None:
            reasons.append("needs VBench-I2V's pictures: set pictures to their folder")
        return "; ".join(reasons) or None


def _subject(video: Footage, tools: Tools) -> Measured:
    return measures.consistency(tools.dino(video.frames))


def _likeness(video: Footage, tools: Tools) -> Measured:
    picture = read_picture(video.about["picture"])
    features = tools.dino(picture[None], transforms.picture_for_likeness)[0]
    return measures.likeness(features, tools.dino(video.frames, transforms.for_likeness))


def _background(video: Footage, tools: Tools) -> Measured:
    return measures.consistency(tools.clip_b(video.frames))


def _flickering(video: Footage, tools: Tools) -> Measured:
    return measures.flickering(video.frames)


def _dynamic(video: Footage, tools: Tools) -> Measured:
    kept = video.frames[list(measures.kept_frames(len(video.frames), video.fps))]
    found = tools.magnitudes(kept, share=0.05, both_ends=False)
    return Measured(float(measures.is_dynamic(found, len(kept), kept.shape[1:3])))


def _aesthetic(video: Footage, tools: Tools) -> Measured:
    return measures.aesthetic(tools.clip_l(video.frames), *tools.aesthetic_head)


def _style(video: Footage, tools: Tools) -> Measured:
    images = tools.clip_b(video.frames, transforms.for_clip_as_pictures)
    words = tools.style_words(video.about["appearance_style"])
    return measures.style(images, words, tools.clip_b.logit_scale)


SUBJECT = Dimension("B", _subject, (weights.DINO,))
BACKGROUND = Dimension("B", _background, (weights.CLIP_B,))
FLICKERING = Dimension("A", _flickering)
SMOOTHNESS = Dimension("C", upstream="amt-s.pth (12 MB, huggingface.co/lalala125/AMT)")
DYNAMIC = Dimension("B", _dynamic, (weights.RAFT_THINGS,))
AESTHETIC = Dimension("B", _aesthetic, (weights.CLIP_L, weights.AESTHETIC))
IMAGING = Dimension("C", upstream="musiq_spaq_ckpt-358bb6af.pth (github.com/chaofengc/IQA-PyTorch)")

_GRIT = "grit_b_densecap_objectdet.pth (huggingface.co/OpenGVLab/VBench_Used_Models) and detectron2"
_VICLIP = "ViClip-InternVid-10M-FLT.pth (huggingface.co/OpenGVLab/VBench_Used_Models)"
_UMT = "l16_ptk710_ftk710_ftk400_f16_res224.pth (huggingface.co/OpenGVLab/VBench_Used_Models)"
_DREAMSIM = "DreamSim (about 1000 MB for its three ViT-B/16, package dreamsim)"
_COTRACKER = "cotracker2 (about 200 MB, github.com/facebookresearch/co-tracker)"
_TAG2TEXT = "tag2text_swin_14m.pth (huggingface.co/spaces/xinyu1205/recognize-anything)"

DIMENSIONS: dict[Version, dict[str, Dimension]] = {
    "v1": {
        "subject_consistency": SUBJECT,
        "background_consistency": BACKGROUND,
        "temporal_flickering": FLICKERING,
        "motion_smoothness": SMOOTHNESS,
        "dynamic_degree": DYNAMIC,
        "aesthetic_quality": AESTHETIC,
        "imaging_quality": IMAGING,
        "object_class": Dimension("D", upstream=_GRIT, by_prompt=True),
        "multiple_objects": Dimension("D", upstream=_GRIT, by_prompt=True),
        "human_action": Dimension("C", upstream=_UMT, by_prompt=True),
        "color": Dimension("D", upstream=_GRIT, by_prompt=True),
        "spatial_relationship": Dimension("D", upstream=_GRIT, by_prompt=True),
        "scene": Dimension("D", upstream=_TAG2TEXT, by_prompt=True),
        "appearance_style": Dimension("B", _style, (weights.CLIP_B,), by_prompt=True),
        "temporal_style": Dimension("C", upstream=_VICLIP, by_prompt=True),
        "overall_consistency": Dimension("C", upstream=_VICLIP, by_prompt=True),
    },
    "i2v": {
        "subject_consistency": SUBJECT,
        "background_consistency": BACKGROUND,
        "temporal_flickering": FLICKERING,
        "motion_smoothness": SMOOTHNESS,
        "dynamic_degree": DYNAMIC,
        "aesthetic_quality": AESTHETIC,
        "imaging_quality": IMAGING,
        "i2v_subject": Dimension("B", _likeness, (weights.DINO,), by_prompt=True, picture=True),
        "i2v_background": Dimension("C", upstream=_DREAMSIM, by_prompt=True),
        "camera_motion": Dimension("C", upstream=_COTRACKER, by_prompt=True),
    },
}
"""Version -> dimension -> what it needs. The order is VBench's."""


def names(version: Version) -> tuple[str, ...]:
    """All dimensions of a version."""
    return tuple(DIMENSIONS[version])
