"""`opensora eval`: every suite on a tiny checkpoint, the comparison of two, the table of many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opensora.cli.main import invoke

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"


def run(capsys, *arguments: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of a command."""
    assert invoke([str(argument) for argument in arguments]) == code
    told = capsys.readouterr()
    return told.out, told.err


def scores(folder: Path) -> dict:
    return json.loads((folder / "scores.json").read_text())


@pytest.fixture(scope="module")
def losses(world, tmp_path_factory) -> tuple[Path, Path]:
    """The loss of the tiny generator under two seeds of the noise, as if of two checkpoints."""
    root = tmp_path_factory.mktemp("losses")
    for name, seed in (("a", 0), ("b", 0), ("other", 1)):
        command = ["eval", world.generator, "--suite", "loss", "-o", root / name, "--device", "cpu"]
        settings = [f'cache="{world.latents / "heldout"}"', "levels=3", f"seed={seed}"]
        assert invoke([str(word) for word in (*command, *settings)]) == 0
    return root / "a", root / "other"


def test_the_loss_is_measured_by_level_on_a_cache(losses):
    found = scores(losses[0])
    assert set(found["all"]) == {"loss", "loss_0.17", "loss_0.50", "loss_0.83"}
    estimate = found["all"]["loss"]
    assert estimate["low"] < estimate["mean"] < estimate["high"]
    assert estimate["n"] == 7
    by_level = [found["all"][f"loss_{level}"]["mean"] for level in ("0.17", "0.50", "0.83")]
    assert estimate["mean"] == pytest.approx(sum(by_level) / 3)
    lines = (losses[0] / "values.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"{row:06d}" for row in range(7)]


def test_the_same_checkpoint_meets_the_same_noise(losses, capsys):
    first = losses[0]
    out, _ = run(capsys, "eval", "compare", first, first.parent / "b")
    rows = [line for line in out.splitlines() if line.startswith("all loss")]
    assert len(rows) == 4
    assert all(row.endswith("no difference that n=7 can show") for row in rows)
    out, _ = run(capsys, "eval", "compare", first, first.parent / "b", "--json")
    assert {d["mean"] for d in json.loads(out)["differences"]} == {0.0}


def test_results_of_other_settings_are_not_compared(losses, capsys):
    _, err = run(capsys, "eval", "compare", *losses, code=64)
    assert "seed differ" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("checkpoint", ["vae", "generator"])
def test_a_vae_is_judged_alone_and_in_a_generator_alike(checkpoint, world, tmp_path, capsys):
    path = getattr(world, checkpoint)
    command = ("eval", path, "--suite", "vae", "-o", tmp_path, "--device", "cpu")
    out, _ = run(capsys, *command, f'clips.path="{world.heldout}"', "clips.num=5")
    assert out.splitlines()[0].split() == ["psnr", "ssim", "flicker_added"]
    found = scores(tmp_path)
    assert found["vae"]["psnr"]["n"] == 5
    assert len(found["curves"]["vae"]["psnr"]) == 5
    # Both hold the same VAE, so both find the same.
    again = tmp_path / "again"
    other = ("eval", world.vae, "--suite", "vae", "-o", again, "--device", "cpu")
    run(capsys, *other, f'clips.path="{world.heldout}"', "clips.num=5")
    assert scores(again)["vae"] == found["vae"]


def test_rfvd_of_a_generator_against_a_manifest(world, tmp_path, capsys):
    command = ("eval", world.generator, "--suite", "fvd", "-o", tmp_path, "--device", "cpu")
    settings = (
        f'clips.path="{world.heldout}"', "sampling.schedule.num_steps=2", "extractor.side=32",
        "extractor.channels=16",
    )  # fmt: skip
    _, err = run(capsys, *command, *settings, code=64)
    assert "7 real clips are too few" in err
    reference = tmp_path / "real.safetensors"
    more = (*settings, "allow_small_n=true", f'reference="{reference}"')
    out, _ = run(capsys, *command, *more)
    assert out.splitlines()[0].split() == ["rfvd", "mmd"]
    found = scores(tmp_path)
    assert found["generated"]["rfvd"]["n"] == 7
    assert found["settings"]["extractor"]["convention"] == "common_metrics"
    assert (found["settings"]["n_real"], found["settings"]["frames"]) == (7, 5)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "samples").glob("*.mp4")}
    run(capsys, *command, *more)  # nothing is drawn again, and the reference is read
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "samples").glob("*.mp4")} == before
    assert scores(tmp_path) == found
    _, err = run(capsys, *command, *more, "extractor.side=48", code=64)
    assert "was made otherwise: extractor is" in err


def test_futures_of_scenes_are_judged_beside_their_controls(world, tmp_path, capsys):
    command = ("eval", world.generator, "--suite", "physics", "-o", tmp_path, "--device", "cpu")
    settings = (
        "scenes={kind: scenes, height: 32, width: 32, frames: 5, fps: 4}", "num=4",
        "sampling.schedule.num_steps=2",
    )  # fmt: skip
    run(capsys, *command, *settings)
    found = scores(tmp_path)
    assert {"generated", "untrained", "still", "shuffled", "truth"} <= found.keys()
    assert found["truth"]["score"]["mean"] == pytest.approx(100)
    assert found["still"]["score"]["mean"] < 60
    assert found["settings"]["given_frames"] == 1
    assert len(list((tmp_path / "given").glob("*.png"))) == 4
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.mp4")}
    run(capsys, *command, *settings)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.mp4")} == before
    assert scores(tmp_path) == found


def test_the_table_has_a_row_a_checkpoint_in_three_formats(losses, capsys):
    names = [str(path) for path in losses]
    out, _ = run(capsys, "eval", "tabulate", *names, "--metric", "loss_0.50", "--metric", "loss")
    head, *rows = out.splitlines()
    assert head.split() == ["loss_0.50", "loss"]
    assert [row.split()[0] for row in rows] == names
    out, _ = run(capsys, "eval", "tabulate", *names, "--format", "markdown")
    assert out.splitlines()[1] == "|---|---:|---:|---:|---:|"
    out, _ = run(capsys, "eval", "tabulate", *names, "--format", "json")
    assert json.loads(out)[0]["scores"]["loss all loss"]["n"] == 7


def test_two_results_of_the_arena_are_compared_by_their_records(world, tmp_path, capsys):
    for name in ("a", "b"):
        run(capsys, "eval", world.generator, "-o", tmp_path / name, "--config", TINY / "arena.yaml")
    out, _ = run(capsys, "eval", "compare", tmp_path / "a", tmp_path / "b")
    assert any(line.startswith("trained colour") for line in out.splitlines())
    assert any(line.startswith("untrained colour") for line in out.splitlines())
    assert "better" not in out


@pytest.mark.parametrize(
    ("suite", "settings", "figure"),
    [
        ("loss", "{cache: CACHE, levels: 2}", "all/loss"),
        ("vae", "{clips: {path: CLIPS, num: 2}}", "vae/psnr"),
        (
            "fvd",
            "{clips: {path: CLIPS, num: 4}, allow_small_n: true, "
            "extractor: {side: 32, channels: 8}, sampling: {schedule: {num_steps: 1}}}",
            "generated/rfvd",
        ),
        (
            "physics",
            "{scenes: {height: 32, width: 32, frames: 5, fps: 4}, num: 2, "
            "sampling: {schedule: {num_steps: 1}}}",
            "generated/score",
        ),
    ],
)
def test_every_suite_runs_inside_training(suite, settings, figure, world, tmp_path):
    places = {"CACHE": world.latents / "heldout", "CLIPS": world.heldout}
    for name, path in places.items():
        settings = settings.replace(name, f'"{path}"')
    changes = [f"evaluation={{every: 2, suite: {suite}, settings: {settings}}}", "steps=2"]
    overrides = [*world.overrides("stdit", tmp_path / "run"), *changes]
    assert invoke(["train", str(TINY / "stdit.yaml"), *overrides]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (record,) = [r for r in map(json.loads, lines) if r["kind"] == "evaluation"]
    assert figure in record
    assert (tmp_path / "run/evaluation/step-000002/values.jsonl").is_file()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["eval"], "Usage: opensora eval"),
        (["eval", "x", "--suite", "phisics"], "Did you mean 'physics'?"),
        (["eval", "--suite", "los", "x"], "Did you mean 'loss'?"),
        (["eval", "run", "x", "--suite", "vae", "clip.num=3"], "Did you mean 'clips'?"),
        (["eval", "x", "--siute", "vae"], "--suite"),
        (["eval", "compare", "x"], "B"),
        (["eval", "compare", "x", "y"], "x has no scores.json: run `opensora eval` on it first"),
        (["eval", "tabulate", "x"], "x has no scores.json"),
        (["eval", "tabulate", "x", "--format", "markdwon"], "Did you mean 'markdown'?"),
        (["eval", "x", "--suite", "loss", "cache=y", "clips.num=3"], "exclude each other"),
        (["eval", "x", "--suite", "fvd", "extractor.kind=i3d"], "needs extractor.path"),
        (["eval", "x", "--suite", "fvd", "extractor.convention=stylegan_v"], "of the i3d file"),
        (["eval", "x", "--suite", "physics", "take_two=y"], "take_two goes with real"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_misuse_is_refused_with_64_and_the_mend(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, err = run(capsys, *arguments, code=64)
    assert told in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suite", ["loss", "fvd", "physics", "arena"])
def test_suites_that_draw_or_predict_refuse_a_vae(suite, world, tmp_path, capsys):
    _, err = run(capsys, "eval", world.vae, "--suite", suite, "-o", tmp_path / "x", code=64)
    assert "of the task text_to_video" in err
