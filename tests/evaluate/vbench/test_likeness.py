"""i2v_subject: what the network sees, and the pictures that a run looks for."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from opensora.evaluate.suite import Subject
from opensora.evaluate.vbench import measures, transforms, weights
from opensora.evaluate.vbench.suite import I2V_SUITE
from opensora.evaluate.vbench.tools import Tools
from opensora.evaluate.vbench.weights import Shelf
from opensora.media.read import read_clip
from opensora.media.write import write_image

from .conftest import slide

transformers = pytest.importorskip("transformers")
MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))


def levels(pixels: torch.Tensor) -> np.ndarray:
    """What a transform gave, as (F, H, W, 3) of 0..255."""
    return (pixels.permute(0, 2, 3, 1).numpy() * STD + MEAN) * 255


@pytest.mark.parametrize("size", [(400, 600), (120, 100)])
def test_pictures_are_resized_by_pil_and_frames_much_alike(size):
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    height, width = transforms.shorter_side(*size, 256)
    resized = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    expected = resized[top : top + 224, left : left + 224].astype(float)
    assert np.abs(levels(transforms.picture_for_likeness(frame[None]))[0] - expected).max() <= 1e-3
    frames = levels(transforms.for_likeness(frame[None]))[0]
    # PIL rounds and clips between its two passes: 0.4 levels apart. Not antialiased: 4 and 29.
    assert np.abs(frames.clip(0, 255) - expected).mean() <= 1
    assert frames.min() < -1 or frames.max() > 256, "frames overshoot"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    model = transformers.ViTModel(config, add_pooling_layer=False)
    model.save_pretrained(folder / weights.DINO.name)
    return Shelf(folder)


@pytest.fixture
def world(tmp_path, fill, shelf):
    """A folder of three videos, pictures for two of them, and judge() -> scores, rows."""
    names = ["a cup", "a dog", "a hat"]
    entries = [
        {"prompt_en": name, "dimension": ["i2v_subject"], "image_name": f"{name}.png"}
        for name in names
    ]
    (tmp_path / "p.json").write_text(json.dumps(entries))
    videos = {f"{name}-0.mp4": slide(4, 48, 64, 4, seed=i) for i, name in enumerate(names)}
    fill(tmp_path / "v", videos)
    for i, name in enumerate(names[:2]):
        write_image(tmp_path / f"pictures/{name}.png", slide(1, 60, 60, 0, seed=i)[0])

    def judge(**settings):
        config = I2V_SUITE.config.model_validate(
            {"prompts": str(tmp_path / "p.json"), "dimensions": ["i2v_subject"]}
            | {"weights_dir": str(shelf.folder), "pictures": str(tmp_path / "pictures")}
            | settings
        )
        subject = Subject(videos=tmp_path / "v")
        scores = I2V_SUITE.run(subject, config, tmp_path / "out", lambda *stage: None)
        rows = json.loads((tmp_path / "out/vbench_eval_results.json").read_text())
        return scores, rows.get("i2v_subject")

    return judge


def test_videos_are_held_against_their_own_pictures(world, tmp_path, shelf):
    scores, (overall, rows) = world()
    dino, expected = Tools(shelf, torch.device("cpu")).dino, []
    for i, name in enumerate(["a cup", "a dog"]):
        picture = dino(slide(1, 60, 60, 0, seed=i), transforms.picture_for_likeness)[0]
        frames = dino(read_clip(tmp_path / f"v/{name}-0.mp4").frames, transforms.for_likeness)
        expected.append(measures.likeness(picture, frames).value)
    assert [row["video_results"] for row in rows] == pytest.approx(expected, abs=1e-6)
    assert overall == pytest.approx(np.mean(expected), abs=1e-6)
    assert "a hat.png' cannot be" in " ".join(scores["settings"]["unusable"])


def test_another_picture_is_another_measure(world, tmp_path):
    first = world()[1][1][0]["video_results"]
    write_image(tmp_path / "pictures/a cup.png", slide(1, 40, 40, 0, seed=9)[0])
    assert world()[1][1][0]["video_results"] != first


def test_without_pictures_it_is_skipped_with_what_to_set(world):
    scores, rows = world(pictures=None)
    assert rows is None
    assert "set pictures" in scores["settings"]["skipped"]["i2v_subject"]
