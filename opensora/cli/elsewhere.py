"""What options are called elsewhere, so that a refusal can name ours.

The names are those of Open-Sora 1.x and 2.0, and of diffusers' arguments.
"""

from __future__ import annotations

SAMPLE = {
    "--aes": "--aesthetic",
    "--aspect-ratio": "--aspect, width:height",
    "--cfg-scale": "--guidance",
    "--ckpt-path": "the first argument",
    "--cond-type": "--first, --last, --loop",
    "--condition-frame-length": "--given",
    "--flow": "--motion",
    "--guidance-scale": "--guidance",
    "--image": "--first",
    "--llm-refine": "--refine",
    "--model": "the first argument",
    "--motion-score": "--motion",
    "--negative-prompt": "--negative",
    "--num-frames": "--frames",
    "--num-inference-steps": "--steps",
    "--num-sample": "--per-prompt",
    "--num-sampling-steps": "--steps",
    "--num-steps": "--steps",
    "--num-videos-per-prompt": "--per-prompt",
    "--out": "--output",
    "--prompt": "an argument after the checkpoint",
    "--prompt-path": "--file",
    "--ref": "--first, or --reference with --mask-strategy",
    "--reference-path": "--reference",
    "--refine-prompt": "--refine",
    "--save-dir": "--output",
    "--size": "--height and --width",
    "--output-dir": "--output",
    "--outputs": "--output",
}
"""Option -> what it is here, of `opensora sample`."""
