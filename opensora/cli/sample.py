"""`opensora sample`: what can be asked for, as options.

What can be refused without torch is refused before torch is imported, which takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opensora.errors import CheckpointError, UsageError
from opensora.store import ASK_FOR

# What is drawn, and how.
Checkpoint = Annotated[Path, typer.Argument(help="run, checkpoints folder or checkpoint")]
Prompts = Annotated[list[str] | None, typer.Argument(help="prompts, one video each")]
File = Annotated[
    Path | None, typer.Option("--file", help="prompts from a .txt or a .csv column `text`")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="folder; by default one of its own for these samples, in outputs/samples",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**62, help="of the first sample; each has its own")]
PerPrompt = Annotated[int, typer.Option(min=1, help="videos for each prompt")]
Steps = Annotated[int, typer.Option(min=1, help="sampling steps")]
Guidance = Annotated[float, typer.Option(min=0, help="classifier-free guidance scale; 1 is off")]
Rescale = Annotated[float, typer.Option(min=0, max=1, help="guidance rescale")]
Sampler = Annotated[str, typer.Option(help="euler, heun, dpmpp_2m, ddim, ancestral, renoise")]
Negative = Annotated[str, typer.Option(help="negative prompt")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="any key of the sampling config"),
]
Cache = Annotated[str, typer.Option(help="spare work: teacache, first_block, pab, or off")]
CacheThreshold = Annotated[float | None, typer.Option(min=0, help="of teacache and first_block")]
GuideWith = Annotated[Path | None, typer.Option(help="worse checkpoint to guide away from")]

# Frames that are given.
First = Annotated[Path | None, typer.Option(help="picture or video that it begins with")]
Last = Annotated[Path | None, typer.Option(help="picture or video that it ends with")]
Given = Annotated[int | None, typer.Option(min=1, help="frames given of a video")]
Loop = Annotated[bool, typer.Option("--loop", help="end with the first picture")]
Keyframe = Annotated[list[Path] | None, typer.Option(help="pictures to pass, in order")]
Edit = Annotated[Path | None, typer.Option(help="video to change")]
Strength = Annotated[
    float | None, typer.Option(min=0.01, max=1, help="how much to change it; 0.6 by default")
]
PictureFirst = Annotated[
    bool, typer.Option("--picture-first", help="draw a picture, then the video from it")
]
Reference = Annotated[str, typer.Option(help="files for --mask-strategy, a;b")]
MaskStrategy = Annotated[str, typer.Option(help="Open-Sora's, such as 0;0,1,0,-1,1")]

# Sizes and lengths.
NumFrames = Annotated[int | None, typer.Option(min=1, help="frames; as trained by default")]
Height = Annotated[int | None, typer.Option(min=8, help="pixels")]
Width = Annotated[int | None, typer.Option(min=8, help="pixels")]
Resolution = Annotated[str | None, typer.Option(help="such as 240p, 256px")]
Aspect = Annotated[str | None, typer.Option(help="width:height, such as 16:9")]
Fps = Annotated[float | None, typer.Option(min=0.01, help="frames per second")]
Long = Annotated[str | None, typer.Option(help="windows or pyramid: any number of --frames")]
Overlap = Annotated[
    int | None, typer.Option(min=1, help="latent frames that windows share; 2 by default")
]

# Words that are added.
Aesthetic = Annotated[float | None, typer.Option(help="aesthetic score said in the prompt")]
Motion = Annotated[float | None, typer.Option(help="motion score said in the prompt")]
Camera = Annotated[str | None, typer.Option(help="camera motion said in the prompt")]
Refine = Annotated[
    str,
    typer.Option(
        help="write prompts out by a language model: URL of an OpenAI-style API (the key is "
        "OPENAI_API_KEY's), or a folder"
    ),
]
RefineModel = Annotated[str, typer.Option(help="the API's name of the model")]

# Where and how it runs.
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="videos at a time; 8 by default, and changes no video")
]
Format = Annotated[
    str | None,
    typer.Option(
        help="mp4, gif, webm, or png for the first frame; mp4 by default, png of one frame"
    ),
]
Grid = Annotated[bool, typer.Option("--grid", help="also a picture of all of them, grid.png")]
Offload = Annotated[bool, typer.Option("--offload", help="weights wait on the host")]
Quantize = Annotated[str, typer.Option(help="weights of the blocks: int8, fp8, or none")]
TileVae = Annotated[
    str, typer.Option(help="decode in tiles: always, never, or auto where memory asks for it")
]
DecodeChunk = Annotated[int | None, typer.Option(min=1, help="latent frames decoded at a time")]
RawWeights = Annotated[bool, typer.Option(help="the last weights rather than their average")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps")]
Dtype = Annotated[str, typer.Option(help="arithmetic of the denoiser: fp32, bf16, fp16")]
Attention = Annotated[str, typer.Option(help="auto, or a backend that `opensora doctor` finds")]
Share = Annotated[
    str,
    typer.Option(
        help="what ranks under torchrun share: prompts, or each video by its sequence, "
        "guidance, both"
    ),
]


def sample(
    checkpoint: Checkpoint,
    prompts: Prompts = None,
    file: File = None,
    output: Output = None,
    seed: Seed = 0,
    per_prompt: PerPrompt = 1,
    steps: Steps = 30,
    guidance: Guidance = 3.0,
    rescale: Rescale = 0.0,
    sampler: Sampler = "euler",
    negative: Negative = "",
    settings: Settings = None,
    cache: Cache = "off",
    cache_threshold: CacheThreshold = None,
    guide_with: GuideWith = None,
    first: First = None,
    last: Last = None,
    given: Given = None,
    loop: Loop = False,
    keyframe: Keyframe = None,
    edit: Edit = None,
    strength: Strength = None,
    picture_first: PictureFirst = False,
    reference: Reference = "",
    mask_strategy: MaskStrategy = "",
    frames: NumFrames = None,
    height: Height = None,
    width: Width = None,
    resolution: Resolution = None,
    aspect: Aspect = None,
    fps: Fps = None,
    long: Long = None,
    overlap: Overlap = None,
    aesthetic: Aesthetic = None,
    motion: Motion = None,
    camera: Camera = None,
    refine: Refine = "",
    refine_model: RefineModel = "",
    batch_size: BatchSize = None,
    format: Format = None,
    grid: Grid = False,
    offload: Offload = False,
    quantize: Quantize = "none",
    tile_vae: TileVae = "auto",
    decode_chunk: DecodeChunk = None,
    raw_weights: RawWeights = False,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    attention: Attention = "auto",
    share: Share = "prompts",
) -> None:
    """Draw videos from prompts. Under torchrun ranks share the prompts, or each video."""
    texts = list(prompts or [])
    if bool(texts) == (file is not None):
        raise UsageError("give prompts as arguments, or a --file of them")
    if not checkpoint.exists():
        raise CheckpointError(f"{checkpoint} does not exist: {ASK_FOR}; nothing is downloaded")
    from opensora.cli.asked import Asked, Frames, Size, Words
    from opensora.cli.sampling import draw
    from opensora.cli.speed import cache_tree, savings_tree

    guided = {"scale": guidance, "rescale": rescale}
    suffix = format and f".{format.lstrip('.')}"
    spared = cache_tree(cache, cache_threshold)
    asked = Asked(
        Words(texts, file, reference, mask_strategy, aesthetic, motion, camera),
        Frames(first, last, given, keyframe or (), edit, strength, loop, picture_first),
        Size(frames, height, width, fps, resolution, aspect),
        output, seed, per_prompt,
        {"sampler": sampler, "schedule": {"num_steps": steps}, "guidance": guided, "cache": spared},
        negative, batch_size, suffix, not raw_weights, device, attention,
        settings or [], long, overlap, guide_with, share, refine, refine_model, grid,
        savings_tree(offload, quantize, tile_vae, decode_chunk), dtype,
    )  # fmt: skip
    draw(checkpoint, asked)
