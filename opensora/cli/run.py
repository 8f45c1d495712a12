"""Commands that run something: train, encode, sample, eval, report.

What can be refused without torch is refused before torch is imported, which takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from opensora import config as configs
from opensora import interrupts
from opensora.errors import OpensoraError, UsageError

Overrides = typer.Argument(None, metavar="[KEY=VALUE]...", help="overrides, such as optim.lr=1e-3")


def register(app: typer.Typer) -> None:
    """Add the commands of this file to the application."""
    for function in (train, encode, sample):
        app.command()(function)
    app.command("eval")(evaluate)
    app.command()(report)


def train(
    config: Path = typer.Argument(..., help="YAML file of the run, see configs/"),
    overrides: list[str] = Overrides,
) -> None:
    """Train what a config says, or go on where it stopped.

    Also under torchrun: torchrun --nproc-per-node N -m opensora train CONFIG.
    """
    tree = configs.override(configs.read(config), overrides or [])
    from opensora.train.config import TrainConfig

    loaded = configs.validate(TrainConfig, tree, where=str(config))
    from opensora.cli.sampling import sampler_for
    from opensora.runtime import start
    from opensora.train.run import train as run

    place = start(loaded.device, loaded.watchdog.collective_seconds)
    try:
        run(loaded, place, sampler=sampler_for)
    except OpensoraError:
        interrupts.ignore()
        raise
    finally:
        place.close()


def encode(
    config: Path = typer.Argument(..., help="YAML file of an encoding, see configs/"),
    overrides: list[str] = Overrides,
) -> None:
    """Encode clips to cached latents, for quicker training."""
    tree = configs.override(configs.read(config), overrides or [])
    from opensora.cli.encoding import EncodeConfig, run

    run(configs.validate(EncodeConfig, tree, where=str(config)))


def sample(
    checkpoint: Path = typer.Argument(..., help="run, checkpoints folder or checkpoint"),
    prompts: list[str] = typer.Argument(None, help="prompts, one video each"),
    file: Path = typer.Option(None, "--file", help="prompts from a .txt or a .csv column `text`"),
    output: Path = typer.Option(Path("outputs/samples"), "--output", "-o", help="folder"),
    seed: int = typer.Option(0, min=0, max=2**62, help="of the first sample; each has its own"),
    per_prompt: int = typer.Option(1, min=1, help="videos for each prompt"),
    steps: int = typer.Option(30, min=1, help="sampling steps"),
    guidance: float = typer.Option(3.0, min=0, help="classifier-free guidance scale; 1 is off"),
    rescale: float = typer.Option(0.0, min=0, max=1, help="guidance rescale"),
    sampler: str = typer.Option("euler", help="euler, heun, dpmpp_2m, ddim, ancestral, renoise"),
    negative: str = typer.Option("", help="negative prompt"),
    cache: str = typer.Option("off", help="spare work: teacache, first_block, pab, or off"),
    cache_threshold: float = typer.Option(None, min=0, help="of teacache and first_block"),
    offload: bool = typer.Option(False, "--offload", help="weights wait on the host"),
    quantize: str = typer.Option("none", help="weights of the blocks: int8, fp8, or none"),
    tile_vae: bool = typer.Option(False, "--tile-vae", help="decode in tiles"),
    decode_chunk: int = typer.Option(None, min=1, help="latent frames decoded at a time"),
    settings: list[str] = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="any key of the sampling config"
    ),
    guide_with: Path = typer.Option(None, help="worse checkpoint to guide away from"),
    first: Path = typer.Option(None, help="picture or video that it begins with"),
    last: Path = typer.Option(None, help="picture or video that it ends with"),
    given: int = typer.Option(None, min=1, help="frames given of a video"),
    loop: bool = typer.Option(False, "--loop", help="end with the first picture"),
    keyframe: list[Path] = typer.Option(None, help="pictures to pass, in order"),
    edit: Path = typer.Option(None, help="video to change"),
    strength: float = typer.Option(0.6, min=0.01, max=1, help="how much to change it"),
    picture_first: bool = typer.Option(
        False, "--picture-first", help="draw a picture, then the video from it"
    ),
    reference: str = typer.Option("", help="files for --mask-strategy, a;b"),
    mask_strategy: str = typer.Option("", help="Open-Sora's, such as 0;0,1,0,-1,1"),
    frames: int = typer.Option(None, min=1, help="frames; as trained by default"),
    height: int = typer.Option(None, min=8, help="pixels"),
    width: int = typer.Option(None, min=8, help="pixels"),
    resolution: str = typer.Option(None, help="such as 240p, 256px"),
    aspect: str = typer.Option(None, help="width:height, such as 16:9"),
    fps: float = typer.Option(None, min=0.01, help="frames per second"),
    long: str = typer.Option(None, help="windows or pyramid: any number of --frames"),
    overlap: int = typer.Option(2, min=1, help="latent frames that windows share"),
    aesthetic: float = typer.Option(None, help="aesthetic score said in the prompt"),
    motion: float = typer.Option(None, help="motion score said in the prompt"),
    camera: str = typer.Option(None, help="camera motion said in the prompt"),
    refine: str = typer.Option(
        "",
        help="write prompts out by a language model: URL of an OpenAI-style API (the key is "
        "OPENAI_API_KEY's), or a folder",
    ),
    refine_model: str = typer.Option("", help="the API's name of the model"),
    batch_size: int = typer.Option(8, min=1, help="videos at a time; changes no video"),
    format: str = typer.Option("mp4", help="mp4, gif, webm, or png for the first frame"),
    raw_weights: bool = typer.Option(False, help="the last weights rather than their average"),
    device: str = typer.Option("auto", help="auto, cpu, cuda, mps"),
    attention: str = typer.Option("auto", help="auto, or a backend that `opensora doctor` finds"),
    share: str = typer.Option(
        "prompts",
        help="what ranks under torchrun share: prompts, or each video by its sequence, "
        "guidance, both",
    ),
) -> None:
    """Draw videos from prompts. Under torchrun ranks share the prompts, or each video."""
    texts = list(prompts or [])
    if bool(texts) == (file is not None):
        raise UsageError("give prompts as arguments, or a --file of them")
    from opensora.cli.asked import Frames, Size, Words
    from opensora.cli.sampling import Asked, draw
    from opensora.cli.speed import cache_tree, savings_tree

    guided = {"scale": guidance, "rescale": rescale}
    spared = cache_tree(cache, cache_threshold)
    asked = Asked(
        Words(texts, file, reference, mask_strategy, aesthetic, motion, camera),
        Frames(first, last, given, keyframe or (), edit, strength, loop, picture_first),
        Size(frames, height, width, fps, resolution, aspect),
        output, seed, per_prompt,
        {"sampler": sampler, "schedule": {"num_steps": steps}, "guidance": guided, "cache": spared},
        negative, batch_size, f".{format.lstrip('.')}", not raw_weights, device, attention,
        settings or [], long, overlap, guide_with, share, refine, refine_model,
        savings_tree(offload, quantize, tile_vae, decode_chunk),
    )  # fmt: skip
    draw(checkpoint, asked)


def evaluate(
    checkpoint: Path = typer.Argument(..., help="run, checkpoints folder or checkpoint"),
    suite: str = typer.Option("arena", help="what to measure: arena"),
    output: Path = typer.Option(None, "--output", "-o", help="folder; beside the run by default"),
    config: Path = typer.Option(None, "--config", help="YAML with the suite's settings"),
    overrides: list[str] = Overrides,
    device: str = typer.Option("auto", help="auto, cpu, cuda, mps"),
) -> None:
    """Judge a checkpoint beside its controls."""
    tree: dict[str, Any] = {} if config is None else configs.read(config)
    tree = configs.override(tree, overrides or [])
    from opensora.cli.judging import run

    run(checkpoint, suite, tree, str(config or "eval"), output, device)


def report(
    folder: Path = typer.Argument(..., help="run folder, or a folder of runs and scores"),
    output: Path = typer.Option(None, "--output", "-o", help="page; FOLDER/report.html by default"),
    embed: float = typer.Option(
        25.0, min=0, metavar="MB", help="videos held by the page itself; others are linked"
    ),
) -> None:
    """Write one offline HTML page from what runs left on disk."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: name a run, or a folder of runs")
    from opensora.report.page import write_report

    typer.echo(write_report(folder, output, max_bytes=int(embed * 1e6)))
