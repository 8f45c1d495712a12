"""The whole pipeline through the command line, from rendered clips to judged videos."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest

from opensora.cli.main import invoke
from opensora.engine import checkpoint
from opensora.infer.records import read_records
from opensora.media.read import read_clip
from opensora.train.tracking import read_records as read_metrics

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "tiny"
FOOTAGE = ROOT.parent / "shared" / "data" / "videos"

pytestmark = pytest.mark.xdist_group("end-to-end")


def run(*arguments: object) -> None:
    assert invoke([str(argument) for argument in arguments]) == 0


def places(**folders: Path) -> list[str]:
    """Overrides that point keys at folders; '__' stands for a dot."""
    return [f'{key.replace("__", ".")}="{path}"' for key, path in folders.items()]


def losses(output: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(output / "metrics.jsonl") if r["kind"] == "train"]


def train_both(root: Path, train: Path, held: Path, *sizes: str, steps: int) -> None:
    """Autoencoder, latents of both manifests, text to video; `sizes` change the buckets."""
    quiet = ("log.bar=false", "device=cpu", "validation.every=0", "checkpoint.every=0")
    data = [change.replace("buckets.", "data.buckets.") for change in sizes]
    run(
        "train", TINY / "vae.yaml", *quiet, *data, f"steps={steps}",
        *places(output=root / "vae", data__manifest=train, data__validation=held),
    )  # fmt: skip
    for name, manifest in (("train", train), ("held", held)):
        output = root / "latents" / name
        vae_from = root / "vae"
        run("encode", TINY / "encode.yaml", "device=cpu", *sizes,
            *places(output=output, manifest=manifest, vae_from=vae_from))  # fmt: skip
    run(
        "train", TINY / "stdit.yaml", *quiet, *data, f"steps={steps}",
        *places(output=root / "t2v", task__vae_from=root / "vae",
                data__cache=root / "latents/train", data__validation=root / "latents/held"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """Everything from nothing, in a folder whose name has a space and letters beyond ASCII."""
    root = tmp_path_factory.mktemp("end to énd ☃")
    scenes = ("--config", TINY / "scenes.yaml")
    run("data", "render", root / "data/train", "--count", 12, *scenes)
    run("data", "render", root / "data/held", "--count", 4, "--split", "heldout", *scenes)
    train, held = root / "data/train/manifest.csv", root / "data/held/manifest.csv"
    run("data", "check", train, "--config", TINY / "vae.yaml", *places(data__manifest=train))
    train_both(root, train, held, steps=12)
    prompts = root / "prompts.csv"
    prompts.write_text('text\na red circle moving right\n"a blue square, moving up"\n')
    run("sample", root / "t2v", "--file", prompts, "-o", root / "samples", "--steps", 3)
    judging = ("--config", TINY / "arena.yaml", "sampling.schedule.num_steps=2")
    run("eval", root / "t2v", "-o", root / "eval", *judging)
    return root


def test_the_runs_learn_finite_numbers(pipeline):
    for name in ("vae", "t2v"):
        found = losses(pipeline / name)
        assert len(found) == 12
        assert all(math.isfinite(loss) for loss in found)
    vae = losses(pipeline / "vae")
    assert vae[-1] < 0.8 * vae[0]
    records = read_metrics(pipeline / "vae/metrics.jsonl")
    assert records[-1]["kind"] == "validation"
    assert records[-1]["psnr"] > 5


def test_a_checkpoint_holds_all_that_sampling_needs(pipeline):
    snapshot = checkpoint.load(checkpoint.find(pipeline / "t2v"))
    assert snapshot.step == 12
    assert snapshot.progress["shape"] == {"num_frames": 5, "height": 32, "width": 32, "fps": 8.0}
    config = json.loads(snapshot.config)
    assert config["task"]["vae"]["latent_channels"] == 4
    assert set(checkpoint.prefixed(snapshot.frozen, "vae")) > {"latent_mean", "latent_std"}


def test_prompts_became_videos(pipeline):
    records = read_records(pipeline / "samples")
    assert [r["prompt"] for r in records] == [
        "a red circle moving right",
        "a blue square, moving up",
    ]
    for record in records:
        clip = read_clip(pipeline / "samples" / record["file"])
        assert (clip.frames.shape, clip.fps) == ((5, 32, 32, 3), 8.0)


def test_the_scores_are_whole(pipeline):
    scores = json.loads((pipeline / "eval/scores.json").read_text())
    for group in ("trained", "untrained", "shuffled", "vae"):
        assert {"colour", "count", "shape"} <= scores[group].keys()
    assert scores["truth"]["colour"]["mean"] == 1.0


def test_every_stage_is_done_when_asked_again(pipeline, capsys):
    before = {p: p.stat().st_mtime_ns for p in pipeline.rglob("*.safetensors")}
    train, held = pipeline / "data/train/manifest.csv", pipeline / "data/held/manifest.csv"
    train_both(pipeline, train, held, steps=12)
    run("sample", pipeline / "t2v", "--file", pipeline / "prompts.csv", "-o", pipeline / "samples",
        "--steps", 3)  # fmt: skip
    assert {p: p.stat().st_mtime_ns for p in pipeline.rglob("*.safetensors")} == before


def test_the_report_shows_the_runs_and_the_videos(pipeline):
    run("report", pipeline)
    page = (pipeline / "report.html").read_text(encoding="utf-8")
    assert "a blue square, moving up" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "data:video/mp4" in page
    run("report", pipeline, "--embed", 0, "-o", pipeline / "linked.html")
    assert "data:video/mp4" not in (pipeline / "linked.html").read_text(encoding="utf-8")


def test_one_clip_is_learnt_by_heart(tmp_path, world):
    """A model that cannot overfit one clip learns nothing at all."""
    rows = list(csv.reader(world.train.read_text(encoding="utf-8").splitlines()))
    one = tmp_path / "one.csv"
    path = rows[0].index("path")
    rows[1][path] = str(world.train.parent / rows[1][path])
    with one.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows[:2])
    run("encode", TINY / "encode.yaml", *world.overrides("encode", tmp_path / "latents"),
        f'manifest="{one}"', "buckets.resolutions={32px: {5: {batch_size: 1}}}")  # fmt: skip
    run(
        "train", TINY / "stdit.yaml", *world.overrides("stdit", tmp_path / "run"),
        *places(data__cache=tmp_path / "latents"), "data.validation=null", "steps=150",
        "data.buckets.resolutions={32px: {5: {batch_size: 1}}}", "task.masks.ratios={}",
    )  # fmt: skip
    found = losses(tmp_path / "run")
    assert sum(found[-20:]) < 0.35 * sum(found[:20])


def test_a_broken_clip_is_replaced_and_written_down(tmp_path, world):
    """The run goes on with another clip, and the run's folder says which one is broken and why."""
    data = tmp_path / "data"
    shutil.copytree(world.train.parent, data)
    rows = list(csv.DictReader((data / "manifest.csv").read_text(encoding="utf-8").splitlines()))
    broken = data / rows[3]["path"]
    broken.write_bytes(broken.read_bytes()[:400])
    output = tmp_path / "run"
    places_of_run = (*world.overrides("vae", output), f'data.manifest="{data / "manifest.csv"}"')
    run("train", TINY / "vae.yaml", *places_of_run, "steps=4", "data.clips.max_bad_fraction=0.1")
    (found,) = csv.reader((output / "quarantine.csv").read_text(encoding="utf-8").splitlines())
    assert found[:2] == ["3", str(broken)]
    assert len(losses(output)) == 4


def test_a_folder_of_real_footage_goes_the_same_way(tmp_path):
    if not FOOTAGE.is_dir():
        pytest.skip(f"no footage at {FOOTAGE}")
    videos = tmp_path / "videos"
    videos.mkdir()
    names = ("bikes_scene_cuts.mp4", "carphone_pristine_qcif.mp4", "asl_bird.mkv")
    for name in names:
        shutil.copy(FOOTAGE / name, videos)
    (videos / "asl_bird.txt").write_text("a woman signs the word bird")
    manifest = tmp_path / "manifest.csv"
    run("data", "probe", videos, "-o", manifest)
    rows = list(csv.DictReader(manifest.read_text(encoding="utf-8").splitlines()))
    captions = [row["text"] for row in rows]
    assert all(row["path"].startswith("videos/") for row in rows)  # below the manifest's folder
    assert len(captions) == 3
    assert "a woman signs the word bird" in captions
    sizes = ("buckets.resolutions={32px: {5: {batch_size: 3}}}",)
    train_both(tmp_path, manifest, manifest, *sizes, steps=2)
    run("sample", tmp_path / "t2v", "a bird", "-o", tmp_path / "samples", "--steps", 2)
    (record,) = read_records(tmp_path / "samples")
    assert read_clip(tmp_path / "samples" / record["file"]).frames.shape == (5, 32, 32, 3)
