"""Every suite on two ranks, which are processes with gloo between them, is the suite on one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from opensora.cli.main import invoke
from opensora.infer.records import read_records
from opensora.media.write import write_video
from tests.evaluate.vbench.conftest import moving
from tests.train.forked import Ranks

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("train-faults")]

SMALL = ["scenes={kind: scenes, height: 32, width: 32, frames: 5, fps: 4}", "batch_size=2"]
QUICK = "sampling.schedule.num_steps=2"
ENTRY = {"prompt_en": "a still of a red stop sign", "dimension": ["temporal_flickering"]}


def command(suite: str, checkpoint: Path, output: Path, *settings: str) -> list[str]:
    words = ["eval", checkpoint, "--suite", suite, "-o", output, "--device", "cpu", *settings]
    return [str(word) for word in words]


def settings_of(suite: str, world, folder: Path) -> list[str]:
    clips = f'clips.path="{world.heldout}"'
    if suite == "vbench":
        (folder / "prompts.json").write_text(json.dumps([ENTRY]))
        counts = ["samples_per_prompt=3", "flicker_samples=5", "batch_size=2", QUICK]
        return [f'prompts="{folder / "prompts.json"}"', "dimensions=[temporal_flickering]", *counts]
    return {
        "arena": [*SMALL, "num_prompts={1: 3, 2: 2}", QUICK],
        "physics": [*SMALL, "num=5", QUICK],
        "fvd": [
            *(clips, "generated=5", "allow_small_n=true", "batch_size=2", QUICK),
            "extractor={side: 32, channels: 8}",
        ],
        "vae": [clips, "clips.num=5"],
        "loss": [f'cache="{world.latents / "heldout"}"', "levels=3"],
    }[suite]


def files(folder: Path) -> dict[str, bytes]:
    """What judging left, but for the records in the order in which videos were drawn."""
    kept = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    return {
        str(name): path.read_bytes()
        for name, path in kept.items()
        if name.name not in ("samples.jsonl", "measures.jsonl")
    }


def untold(found: dict[str, bytes], *folders: Path) -> dict[str, bytes]:
    """Files without the folders that they lie in."""
    for folder in folders:
        found = {k: v.replace(str(folder).encode(), b"OUT") for k, v in found.items()}
    return found


@pytest.mark.parametrize("suite", ["arena", "physics", "fvd", "vae", "loss", "vbench"])
def test_two_ranks_write_what_one_writes(suite, world, tmp_path):
    torch.set_num_threads(1)
    settings = settings_of(suite, world, tmp_path)
    checkpoint = world.vae if suite == "vae" else world.generator
    one, two = tmp_path / "one", tmp_path / "two"
    assert invoke(command(suite, checkpoint, one, *settings)) == 0
    ranks = Ranks(command(suite, checkpoint, two, *settings), tmp_path / "ranks")
    assert ranks.wait() == [0, 0], ranks.told(0) + ranks.told(1)
    assert untold(files(two), two) == untold(files(one), one)
    assert (two / "scores.json").is_file()
    for records in one.rglob("samples.jsonl"):
        place = two / records.parent.relative_to(one)
        assert len(read_records(place)) == len(read_records(records.parent)) >= 3


@pytest.mark.parametrize("suite", ["arena", "physics"])
def test_a_killed_rank_loses_nothing_and_another_number_of_ranks_goes_on(suite, world, tmp_path):
    torch.set_num_threads(1)
    steps = "sampling.schedule.num_steps=12"
    settings = [*settings_of(suite, world, tmp_path)[:-1], steps]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert invoke(command(suite, world.generator, whole, *settings)) == 0
    arguments = command(suite, world.generator, killed, *settings)
    ranks = Ranks(arguments, tmp_path / "ranks")
    deadline = time.monotonic() + 60
    while not list(killed.glob("samples/*.mp4")) and time.monotonic() < deadline:
        time.sleep(0.001)
    ranks.kill([1])
    assert ranks.wait() in ([69, -9], [75, -9])  # the other one saw it, or was told to stop
    assert len(ranks.told(0).split("opensora: ")) == 2
    before = {p: p.stat().st_mtime_ns for p in killed.glob("samples/*.mp4")}
    recorded = {r["file"] for r in read_records(killed / "samples")}
    assert len(before) < 5 and not (killed / "scores.json").exists()
    assert invoke(arguments) == 0
    for path, moment in before.items():
        assert path.stat().st_mtime_ns == moment or path.name not in recorded
    assert untold(files(killed), killed) == untold(files(whole), whole)


def test_what_ends_one_rank_ends_both_with_its_line(world, tmp_path):
    """A folder of videos of which the second, the other rank's, is cut short."""
    for folder in ("real", "made"):
        for index in range(3):
            write_video(tmp_path / folder / f"{index}.mp4", moving("", index), fps=8)
    damaged = tmp_path / "made" / "1.mp4"
    damaged.write_bytes(damaged.read_bytes()[:900])
    real = f'real="{tmp_path / "real"}"'
    arguments = command("physics", tmp_path / "made", tmp_path / "out", real)
    ranks = Ranks(arguments, tmp_path / "ranks")
    assert ranks.wait() == [65, 65]
    lines = [[w for w in ranks.told(r).splitlines() if "opensora: " in w] for r in (0, 1)]
    assert [len(told) for told in lines] == [1, 1]
    assert "1.mp4" in lines[1][0] and lines[1][0][10:] in lines[0][0]
    assert not (tmp_path / "out" / "scores.json").exists()


@pytest.mark.parametrize("suite", ["arena", "physics", "fvd"])
def test_videos_that_are_cut_short_or_gone_are_drawn_again(suite, world, tmp_path):
    torch.set_num_threads(1)
    arguments = command(suite, world.generator, tmp_path, *settings_of(suite, world, tmp_path))
    assert invoke(arguments) == 0
    before = files(tmp_path)
    first, second, third = sorted((tmp_path / "samples").glob("*.mp4"))[:3]
    first.write_bytes(first.read_bytes()[:900])
    third.unlink()
    kept = second.stat().st_mtime_ns
    assert invoke(arguments) == 0
    assert files(tmp_path) == before
    assert second.stat().st_mtime_ns == kept
