"""Options that make sampling faster or smaller reach it, and `plan --sample` says what it takes."""

import json
import re
from pathlib import Path

import pytest

from opensora.cli.main import invoke
from tests.infer.conftest import build_pipeline
from tests.infer.test_pipeline import save_run

LARGE = str(Path(__file__).resolve().parents[2] / "configs/mmdit/11b.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    save_run(build_pipeline(), folder / "run", averages=1.0)
    return folder / "run"


def drawn(run, output, *options):
    command = ["sample", run, "a red circle", "--output", output, "--steps", "6", *options]
    code = invoke([str(word) for word in [*command, "--device", "cpu", "--format", "png"]])
    if code:
        return code
    (record,) = map(json.loads, (output / "samples.jsonl").read_text().splitlines())
    return record, (output / record["file"]).read_bytes()


def test_a_cache_and_its_threshold_are_recorded_and_change_the_video(run, tmp_path):
    plain, picture = drawn(run, tmp_path / "plain")
    record, off = drawn(run, tmp_path / "off", "--cache", "teacache", "--cache-threshold", "0")
    assert plain["sampling"]["cache"] is None and off == picture
    assert record["sampling"]["cache"]["threshold"] == 0
    options = ("--cache", "teacache", "--set", "cache.threshold=0.4")
    record, other = drawn(run, tmp_path / "on", *options)
    assert record["sampling"]["cache"]["threshold"] == 0.4 and other != picture


def test_less_memory_draws_the_same_video_and_smaller_weights_are_named(run, tmp_path):
    plain, picture = drawn(run, tmp_path / "plain")
    record, away = drawn(run, tmp_path / "away", "--offload", "--decode-chunk", "2")
    assert away == picture and record["weights"] == plain["weights"]
    pytest.importorskip("torchao", exc_type=ImportError)
    record, _ = drawn(run, tmp_path / "small", "--quantize", "int8")
    assert record["weights"] == f"{plain['weights']} int8"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--cache", "teacash"], "teacash"),
        (["--cache", "pab", "--cache-threshold", "0.1"], "but --cache is pab"),
        (["--cache-threshold", "0.1"], "but --cache is off"),
        (["--quantize", "int4"], "int4"),
        (["--tile-vae", "sometimes"], "say auto, always, never"),
        (["--cache", "first_block"], "use teacache or pab"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(options, told, run, tmp_path, capsys):
    assert drawn(run, tmp_path, *options) == 64
    assert told in capsys.readouterr().err


def test_a_plan_of_a_checkpoint_takes_its_size_from_it(run, capsys):
    assert invoke(["plan", str(run), "--sample", "--batch", "3", "--rate", "0.05"]) == 0
    told = capsys.readouterr().out
    parameters = sum(p.numel() for p in build_pipeline().model.parameters())
    assert told.startswith(f"{parameters:,} parameters; 3 x 5x32x32, 8 tokens each")
    assert "0.05 TFLOP/s, as given" in told
    assert re.search(r"fits .* of one rtx4090 as it is", told)


def test_a_plan_of_a_config_names_the_options_that_make_it_fit(capsys):
    command = ["plan", LARGE, "--sample", "--gpu", "rtx4090"]
    assert invoke([*command, "--frames", "33", "--height", "256", "--width", "256"]) == 0
    told = capsys.readouterr().out
    assert "11,901,525,056 parameters; 1 x 33x256x256" in told
    assert re.search(r"fits \S+ GB of one rtx4090 with --quantize int8: \S+ GB\n", told)


def test_what_no_saving_makes_fit_is_refused_with_the_reason(capsys):
    command = ["plan", LARGE, "--sample", "--gpu", "rtx4090", "--batch", "4096"]
    assert invoke([*command, "--frames", "33", "--height", "256", "--width", "256"]) == 64
    told = capsys.readouterr().err
    assert re.search(r"does not fit one rtx4090 with any savings: without them \w+ needs", told)


def test_a_checkpoint_takes_no_overrides(run, capsys):
    assert invoke(["plan", str(run), "task.model.depth=2", "--sample"]) == 64
    assert "without overrides" in capsys.readouterr().err
