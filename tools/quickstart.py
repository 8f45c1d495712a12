"""The quickstart: every stage of the pipeline as the command that a user would type.

Each stage is an `opensora` command that skips what is done and goes on where it was stopped, so
this program only orders them, times them, and writes down what it ran in `commands.json`.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opensora.errors import OpensoraError

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "quickstart"
NUM_CLIPS = 2400
NUM_VALIDATION = 64
VALIDATION_EVERY = 8


@dataclass(frozen=True)
class Stage:
    """A named command line of `opensora`."""

    name: str
    arguments: tuple[str, ...]


def assign(key: str, value: object) -> str:
    """A dotted override whose value survives YAML whatever characters a path has."""
    return f"{key}={json.dumps(str(value), ensure_ascii=False)}"


def training(
    output: Path, train: Path, validation: Path, changes: tuple[str, ...] = ()
) -> Iterator[Stage]:
    """Train the VAE, encode, train the generator, whose config gets `changes`."""
    vae, latents = output / "vae", output / "latents"
    places = [
        assign("output", vae),
        assign("data.manifest", train),
        assign("data.validation", validation),
    ]
    yield Stage("train the VAE", ("train", f"{CONFIGS / 'vae.yaml'}", *places))
    for name, manifest in (("train", train), ("validation", validation)):
        places = [
            assign("output", latents / name),
            assign("vae_from", vae),
            assign("manifest", manifest),
        ]
        yield Stage(f"encode {name} clips", ("encode", f"{CONFIGS / 'encode.yaml'}", *places))
    places = [
        assign("output", output / "t2v"),
        assign("task.vae_from", vae),
        assign("data.cache", latents / "train"),
        assign("data.validation", latents / "validation"),
    ]
    stage = ("train", f"{CONFIGS / 'stdit.yaml'}", *places, *changes)
    yield Stage("train text-to-video", stage)


def scenes(output: Path) -> Iterator[Stage]:
    """The pipeline on rendered scenes, judged against what their captions promise."""
    config = ("--config", f"{CONFIGS / 'scenes.yaml'}")
    train, validation = output / "data" / "train", output / "data" / "validation"
    for folder, split, count in (
        (train, "train", NUM_CLIPS),
        (validation, "heldout", NUM_VALIDATION),
    ):
        options = ("--count", f"{count}", "--split", split, "--workers", "2", *config)
        yield Stage(f"render {folder.name} clips", ("data", "render", f"{folder}", *options))
    manifests = (train / "manifest.csv", validation / "manifest.csv")
    yield from training(output, *manifests)
    options = ("--config", f"{CONFIGS / 'arena.yaml'}", "--output", f"{output}")
    yield Stage("sample and judge", ("eval", f"{output / 't2v'}", *options))
    yield Stage("report", ("report", f"{output}"))


def footage(output: Path, videos: Path) -> Iterator[Stage]:
    """The same pipeline on a folder of videos; there is no truth to judge against."""
    manifest = output / "data" / "all.csv"
    captions = videos / "captions.csv"
    options = ("--captions", f"{captions}") if captions.exists() else ()
    probe = ("data", "probe", f"{videos}", "--output", f"{manifest}", "--decode", *options)
    yield Stage("probe the videos", probe)
    fitting = usable(manifest)
    train, validation = split(manifest, fitting)
    prompts = prompts_of(manifest, fitting)
    quoted = json.dumps(prompts[:4], ensure_ascii=False)
    changes = (f"samples.prompts={quoted}",)
    yield from training(output, train, validation, changes)
    text = output / "data" / "prompts.txt"
    text.write_text("\n".join(prompts[:16]) + "\n", encoding="utf-8")
    options = ("--file", f"{text}", "--output", f"{output / 'samples'}")
    yield Stage("sample", ("sample", f"{output / 't2v'}", *options))
    yield Stage("report", ("report", f"{output}"))


def split(manifest: Path, fitting: list[int]) -> tuple[Path, Path]:
    """Every so many-th of the clips that fit becomes validation, in two tables beside the manifest.

    Clips that are too short or too small stay in the table of training, whose census says why it
    leaves them out.
    """
    rows, columns = table(manifest)
    held = fitting[::VALIDATION_EVERY] if len(fitting) > 1 else []
    parts = {
        "train.csv": [row for number, row in enumerate(rows) if number not in held],
        "validation.csv": [rows[number] for number in held or fitting],
    }
    for name, part in parts.items():
        with open(manifest.parent / name, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(part)
    return manifest.parent / "train.csv", manifest.parent / "validation.csv"


def table(manifest: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The rows and the columns of a CSV file."""
    with open(manifest, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        return list(reader), list(reader.fieldnames or [])


def usable(manifest: Path) -> list[int]:
    """Rows of a manifest that have a bucket in the VAE's config.

    Raises:
        DataError: there are none, with the census.
    """
    # Here, because torch takes seconds to import and rendering needs none of it.
    from opensora import config as configs
    from opensora import zoo
    from opensora.data import manifest as manifests
    from opensora.data.assignment import BucketAssigner
    from opensora.train.autoencoder import AutoencoderConfig
    from opensora.train.config import TrainConfig

    config = configs.load(TrainConfig, CONFIGS / "vae.yaml")
    assert isinstance(config.task, AutoencoderConfig)
    stride = zoo.build_vae(config.task.vae).stride
    rows = manifests.read(manifest)
    assigner = BucketAssigner(
        rows, config.data.buckets, stride=stride, patch=(1, 1, 1), seed=config.seed
    )
    return [row for row, bucket in enumerate(assigner(0).bucket_of_row.tolist()) if bucket >= 0]


def prompts_of(manifest: Path, fitting: list[int]) -> list[str]:
    """The distinct captions of the clips that fit, in order."""
    rows, _ = table(manifest)
    return list(dict.fromkeys(rows[number]["text"] for number in fitting))


def run(stages: Iterator[Stage], output: Path) -> int:
    """Run the stages until one fails; returns the exit code."""
    log: list[dict[str, object]] = []
    began = time.monotonic()
    for number, stage in enumerate(stages, 1):
        command = [sys.executable, "-m", "opensora", *stage.arguments]
        shown = shlex.join(["opensora", *stage.arguments])
        print(f"\n[{number}] {stage.name}\n    {shown}", flush=True)
        started = time.monotonic()
        code = subprocess.run(command, check=False).returncode
        seconds = round(time.monotonic() - started, 1)
        log.append({"command": shown, "seconds": seconds, "exit": code})
        path = output / "commands.json"
        path.write_text(json.dumps(log, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if code:
            print(f"\nstage '{stage.name}' ended with exit code {code}", file=sys.stderr)
            if code == 75:
                print("run the same command again to go on", file=sys.stderr)
            return code
        print(f"    {seconds:.0f} s", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"\nDone in {minutes:.1f} minutes. Open {output / 'report.html'}")
    return 0


def main() -> int:
    """Parse the two options and run."""
    parser = argparse.ArgumentParser(description="The quickstart's stages, one after the other.")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything")
    parser.add_argument("--videos", type=Path, help="a folder of your own videos")
    options = parser.parse_args()
    output = options.output.resolve()
    (output / "data").mkdir(parents=True, exist_ok=True)
    if options.videos is None:
        return run(scenes(output), output)
    if not options.videos.is_dir():
        print(f"quickstart: {options.videos} is not a folder", file=sys.stderr)
        return 64
    try:
        return run(footage(output, options.videos.resolve()), output)
    except OpensoraError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
