"""Every option of `opensora sample` does something beside every way of drawing, or is refused."""

from pathlib import Path

import pytest
import typer

from opensora.cli import sampling as drawing
from opensora.cli.main import app, invoke
from opensora.cli.sample_rules import refuse_unused
from opensora.errors import UsageError
from opensora.infer.pipeline import SamplingConfig
from opensora.media.write import write_video
from tests.infer.conftest import build_pipeline
from tests.infer.test_conditions import moving
from tests.infer.test_pipeline import save_run

MODES = {
    "plain": ["--frames", "9"],
    "windows": ["--frames", "9", "--long", "windows", "--overlap", "1"],
    "pyramid": ["--frames", "9", "--long", "pyramid"],
    "cache": ["--frames", "9", "--cache", "teacache", "--set", "cache.levels=[0,1]"],
    "offload": ["--frames", "9", "--offload"],
    "quantize": ["--frames", "9", "--quantize", "int8"],
}
CHANGES: dict[str, list[str]] = {
    "seed": ["--seed", "5"],
    "steps": ["--steps", "3"],
    "guidance": ["--guidance", "9"],
    "rescale": ["--rescale", "1"],
    "sampler": ["--sampler", "renoise"],
    "negative": ["--negative", "a grey cloud"],
    "set": ["--set", "schedule.spacing=karras"],
    "guide-with": ["--guide-with", "WORSE"],
    "first": ["--first", "PICTURE"],
    "given": ["--first", "VIDEO", "--given", "5"],
    "last": ["--last", "PICTURE"],
    "loop": ["--first", "PICTURE", "--loop"],
    "keyframe": ["--keyframe", "PICTURE", "--keyframe", "PICTURE"],
    "edit": ["--edit", "VIDEO"],
    "strength": ["--edit", "VIDEO", "--strength", "0.9"],
    "picture-first": ["--picture-first"],
    "reference": ["--reference", "PICTURE"],
    "mask-strategy": ["--reference", "PICTURE", "--mask-strategy", "0,0,0,1,1,0.3"],
    "frames": ["--frames", "5"],
    "height": ["--height", "48"],
    "width": ["--width", "48"],
    "resolution": ["--resolution", "48px"],
    "aspect": ["--resolution", "48px", "--aspect", "2:1"],
    "fps": ["--fps", "24"],
    "aesthetic": ["--aesthetic", "6.5"],
    "motion": ["--motion", "3"],
    "camera": ["--camera", "pan left"],
    "raw-weights": ["--raw-weights"],
    "dtype": ["--dtype", "bf16"],
}
"""Options that change the video."""

ELSEWHERE = {
    *("file", "output", "per-prompt", "format", "grid"),  # which files there are
    *("refine", "refine-model"),  # tests/text
    *("batch-size", "device", "attention", "share", "offload", "tile-vae", "decode-chunk"),
    *("cache", "cache-threshold", "quantize", "long", "overlap"),  # the ways of drawing
    "help",
}
"""Options that change no video, and those that are a way of drawing themselves."""

REFUSED = {
    ("windows", "given"): "leaves nothing to draw",  # windows have two latent frames
    ("windows", "last"): "--last would be of the first window only",
    ("windows", "loop"): "--loop would be of the first window only",
    ("windows", "keyframe"): "--keyframe would be of the first window only",
    ("windows", "edit"): "--edit would be of the first window only",
    ("windows", "strength"): "--edit would be of the first window only",
    ("windows", "picture-first"): "of short videos",
    ("pyramid", "picture-first"): "of short videos",
    **{
        ("pyramid", option): "takes no given frames"
        for option in (
            *("first", "given", "last", "loop", "keyframe", "edit", "strength"),
            *("reference", "mask-strategy"),
        )
    },
}
LESS = {"given": ["--first", "VIDEO", "--given", "1"], "strength": CHANGES["edit"],
        "loop": CHANGES["first"], "mask-strategy": CHANGES["reference"],
        "aspect": CHANGES["resolution"]}  # fmt: skip
"""What an option is compared with, where that is not the video without any."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("options")
    save_run(build_pipeline(), folder / "run", averages=0.9)
    save_run(build_pipeline(seed=1), folder / "worse", averages=1.0)
    return {
        "RUN": folder / "run",
        "WORSE": folder / "worse",
        "PICTURE": write_video(folder / "a.png", moving(1), fps=1),
        "VIDEO": write_video(folder / "b.mp4", moving(17), fps=8),
    }


@pytest.fixture(scope="module")
def draw(files, tmp_path_factory):
    """(mode, options) -> the bytes of the video; each is drawn once."""
    known: dict[tuple[str, ...], bytes] = {}

    def drawn(mode: str, options: list[str]) -> bytes:
        key = (mode, *options)
        if key not in known:
            folder = tmp_path_factory.mktemp("drawn")
            words = [str(files.get(word, word)) for word in (*MODES[mode], *options)]
            command = ["sample", str(files["RUN"]), "a red circle", "-o", str(folder)]
            assert invoke([*command, "--steps", "2", "--device", "cpu", *words]) == 0
            (video,) = folder.glob("*.mp4")
            known[key] = video.read_bytes()
        return known[key]

    return drawn


@pytest.fixture
def asked_for(files, monkeypatch):
    """options -> what `opensora sample` asks for with them."""
    found = []
    monkeypatch.setattr(drawing, "draw", lambda checkpoint, asked: found.append(asked))

    def asked(options: list[str]) -> drawing.Asked:
        assert invoke(["sample", str(files["RUN"]), "a dog", *options]) == 0
        return found[-1]

    return asked


def test_no_option_is_forgotten():
    command = typer.main.get_command(app).commands["sample"]  # type: ignore[attr-defined]
    names = {word[2:] for p in command.params for word in p.opts if word.startswith("--")}
    assert names - ELSEWHERE == set(CHANGES)


@pytest.mark.parametrize("option", CHANGES)
@pytest.mark.parametrize("mode", MODES)
def test_an_option_changes_the_video_or_is_refused(mode, option, draw, files, tmp_path, capsys):
    if mode == "quantize":
        pytest.importorskip("torchao", exc_type=ImportError)
    if (mode, option) in REFUSED:
        words = [str(files.get(word, word)) for word in (*MODES[mode], *CHANGES[option])]
        assert invoke(["sample", str(files["RUN"]), "a", "-o", str(tmp_path), *words]) == 64
        assert REFUSED[mode, option] in capsys.readouterr().err
        return
    assert draw(mode, CHANGES[option]) != draw(mode, LESS.get(option, []))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--strength", "0.3"], "with --edit"),
        (["--first", "a.png", "--given", "5"], "frames of a video"),
        (["--given", "5"], "frames of a video"),
        (["--refine-model", "small"], "with --refine"),
        (["--picture-first", "--reference", "a.png"], "leave out --reference"),
        (["--overlap", "2"], "--long windows"),
        (["--overlap", "2", "--long", "pyramid"], "--long windows"),
        (["--batch-size", "2", "--long", "windows"], "one at a time"),
        (["--long", "pyramid", "--set", "schedule.kind=autoregressive"], "schedule of its own"),
        (["--long", "pyramid", "--decode-chunk", "1"], "decodes as it goes"),
        (["--long", "pyramid", "--tile-vae", "always"], "decodes as it goes"),
        (["--guidance", "1", "--guide-with", "worse"], "a --guidance other than 1"),
        (["--guidance", "1", "--negative", "a"], "with --guidance 1"),
        (["--guide-with", "worse", "--negative", "a"], "with --guide-with"),
        (["--guidance", "1", "--rescale", "0.5"], "a --guidance other than 1"),
        (["--set", "guidance.frames_ramp=true"], "needs a guidance.frames_scale"),
        (["--guidance", "1", "--set", "guidance.batched=true"], "no branches"),
        (["--share", "sequence"], "needs several ranks"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options, told, files, capsys):
    assert invoke(["sample", str(files["RUN"]), "a dog", *options]) == 64
    line = capsys.readouterr().err.strip()
    assert line.startswith("opensora: ") and "\n" not in line
    assert told in line


@pytest.mark.parametrize("share", ["sequence", "guidance", "both"])
@pytest.mark.parametrize("mode", MODES)
def test_ranks_that_share_take_every_way_of_drawing(mode, share, asked_for):
    """That they draw the same is in tests/infer/test_shared_ways.py."""
    asked = asked_for([*MODES[mode], "--share", share])
    ranks = 4 if share == "both" else 2
    refuse_unused(asked, SamplingConfig.model_validate(asked.sampling), ranks)
    one = asked_for([*MODES[mode], "--share", share, "--guidance", "1"])
    settings = SamplingConfig.model_validate(one.sampling)
    if share == "sequence":
        refuse_unused(one, settings, ranks)
        return
    with pytest.raises(UsageError, match="guidance has 1 branch here"):
        refuse_unused(one, settings, ranks)


def test_three_ranks_need_three_branches(asked_for):
    asked = asked_for(["--share", "guidance"])
    for scale in (1.0, 2.0):
        tree = {**asked.sampling, "guidance": {"scale": 3.0, "frames_scale": scale}}
        settings = SamplingConfig.model_validate(tree)
        if scale == 1:
            with pytest.raises(UsageError, match="guidance has 2 branches here"):
                refuse_unused(asked, settings, 3)
        else:
            refuse_unused(asked, settings, 3)
    tree = {**asked.sampling, "guidance": {"scale": 3.0, "batched": True}}
    with pytest.raises(UsageError, match="gives each rank its own branches"):
        refuse_unused(asked, SamplingConfig.model_validate(tree), 2)
