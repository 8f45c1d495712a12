"""The quickstart's own decisions: which clips of a folder are held out, and what it calls."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

from opensora.errors import DataError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def quickstart():
    """The module tools/quickstart.py."""
    path = ROOT / "tools" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quickstart"]


def write(path: Path, frames: list[int]) -> Path:
    """A manifest of clips of 96x64 at 8 frames per second with these lengths."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text", "num_frames", "height", "width", "fps"])
        for number, count in enumerate(frames):
            writer.writerow([f"{number}.mp4", f"clip {number % 12}", count, 64, 96, 8])
    return path


def names(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row["path"] for row in csv.DictReader(file)]


def test_validation_is_chosen_among_clips_that_training_could_use(quickstart, tmp_path):
    manifest = write(tmp_path / "all.csv", [5, *[40] * 16, 5])
    fitting = quickstart.usable(manifest)
    assert fitting == list(range(1, 17))
    train, validation = quickstart.split(manifest, fitting)
    assert names(validation) == ["1.mp4", "9.mp4"]
    assert names(train) == [f"{n}.mp4" for n in range(18) if n not in (1, 9)]
    assert quickstart.prompts_of(manifest, fitting) == [f"clip {n % 12}" for n in range(1, 13)]


def test_one_clip_alone_is_trained_and_validated_on(quickstart, tmp_path):
    manifest = write(tmp_path / "all.csv", [40, 5])
    train, validation = quickstart.split(manifest, quickstart.usable(manifest))
    assert names(train) == ["0.mp4", "1.mp4"]
    assert names(validation) == ["0.mp4"]


def test_a_folder_of_clips_that_are_too_short_is_refused_with_the_reason(quickstart, tmp_path):
    with pytest.raises(DataError, match="shorter than every length"):
        quickstart.usable(write(tmp_path / "all.csv", [5, 5]))


def test_every_stage_is_a_command_with_a_config_that_exists(quickstart, tmp_path):
    stages = list(quickstart.scenes(tmp_path))
    assert [stage.arguments[0] for stage in stages] == [
        "data", "data", "train", "encode", "encode", "train", "eval", "report",
    ]  # fmt: skip
    for stage in stages:
        for word in stage.arguments:
            assert not word.endswith(".yaml") or Path(word).is_file()


def test_a_stage_that_fails_ends_the_run_with_its_code(quickstart, tmp_path, capfd):
    stages = [quickstart.Stage("nothing", ("train", "nowhere.yaml"))]
    assert quickstart.run(iter([*stages, *quickstart.scenes(tmp_path)]), tmp_path) == 64
    assert "stage 'nothing' ended with exit code 64" in capfd.readouterr().err
    assert '"exit": 64' in (tmp_path / "commands.json").read_text()
