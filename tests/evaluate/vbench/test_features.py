"""DINO and CLIP on tiny random weights against plain reimplementations, and whole dimensions."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from opensora.errors import CheckpointError
from opensora.evaluate.suite import Subject
from opensora.evaluate.vbench import extractors, measures, transforms, weights
from opensora.evaluate.vbench.dimensions import DIMENSIONS, Footage
from opensora.evaluate.vbench.extractors import Clip, Dino, dino_positions
from opensora.evaluate.vbench.raft import RAFT
from opensora.evaluate.vbench.suite import SUITE
from opensora.evaluate.vbench.tools import Tools
from opensora.evaluate.vbench.weights import Shelf
from opensora.media.read import read_clip

from .conftest import slide

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")
SIDE, PATCH, WIDTH, LAYERS = 32, 8, 24, 2


def tiny_clip(folder, seed):
    """A CLIP of random weights with a tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz "
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1} | {
        c: i + 2 for i, c in enumerate(letters)
    }
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=24,
    ).save_pretrained(folder)
    text = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 24,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "pad_token_id": 1,
    }
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    torch.manual_seed(seed)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model = transformers.CLIPModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A weights_dir of tiny random networks under the names of the real ones."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=SIDE,
        patch_size=PATCH,
        layer_norm_eps=1e-12,
    )
    model = transformers.ViTModel(config, add_pooling_layer=False)
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(folder / weights.DINO.name)
    tiny_clip(folder / weights.CLIP_B.name, 1)
    tiny_clip(folder / weights.CLIP_L.name, 2)
    torch.save(torch.nn.Linear(12, 1).state_dict(), folder / weights.AESTHETIC.name)
    torch.save(
        {f"module.{k}": v for k, v in RAFT().state_dict().items()},
        folder / weights.RAFT_THINGS.name,
    )
    return Shelf(folder)


def plain_vit(state, pixels):
    """DINO's forward pass as facebookresearch/dino's vision_transformer.py describes it."""
    x = functional.conv2d(
        pixels,
        state["embeddings.patch_embeddings.projection.weight"],
        state["embeddings.patch_embeddings.projection.bias"],
        stride=PATCH,
    )
    rows, columns = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
    table, side = state["embeddings.position_embeddings"], SIDE // PATCH
    if (rows, columns) != (side, side):
        grid = table[:, 1:].reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / math.sqrt(side**2), (columns + 0.1) / math.sqrt(side**2))
        grid = functional.interpolate(grid, scale_factor=scale, mode="bicubic")
        assert grid.shape[2:] == (rows, columns)
        table = torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, WIDTH)], 1)
    x = x + table
    norm = lambda x, name: functional.layer_norm(  # noqa: E731
        x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6
    )
    linear = lambda x, name: functional.linear(  # noqa: E731
        x, state[f"{name}.weight"], state[f"{name}.bias"]
    )
    names = layer_names(state)
    for i in range(LAYERS):
        at = {part: name.format(i) for part, name in names.items()}
        y = norm(x, at["before"])
        q, k, v = (linear(y, at[part]).unflatten(-1, (3, -1)).transpose(1, 2) for part in "qkv")
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(y, at["out"])
        y = functional.gelu(linear(norm(x, at["after"]), at["up"]))
        x = x + linear(y, at["down"])
    return norm(x, "layernorm")[:, 0]


def layer_names(state):
    """What transformers calls the parts of a layer, which differs between its versions."""
    first = sorted(n for n in state if "0." in n and n.endswith(".weight"))
    pick = lambda *ends: next(  # noqa: E731
        n.removesuffix(".weight").replace(".0.", ".{}.", 1)
        for n in first
        for end in ends
        if n.endswith(end + ".weight")
    )
    return {
        "before": pick("layernorm_before"),
        "after": pick("layernorm_after"),
        "q": pick("query", "q_proj"),
        "k": pick("key", "k_proj"),
        "v": pick("value", "v_proj"),
        "out": pick("attention.output.dense", "o_proj", "out_proj"),
        "up": pick("intermediate.dense", "fc1"),
        "down": pick("0.output.dense", "fc2"),
    }


@pytest.mark.parametrize("size", [(40, 40), (40, 64), (90, 30)])
def test_dino_equals_a_plain_forward_pass_of_any_form(shelf, size):
    frames = slide(3, *size, 4)
    dino = Dino(str(shelf.find(weights.DINO)), CPU)
    state = dino.model.state_dict()
    expected = plain_vit(state, transforms.for_dino(frames, SIDE))
    torch.testing.assert_close(dino(frames), expected, atol=1e-5, rtol=1e-5)


def test_dino_positions_of_a_square_are_its_own():
    table = torch.randn(1, 17, 3)
    assert dino_positions(table, 4, 4) is table
    assert dino_positions(table, 3, 7).shape == (1, 22, 3)


def test_batches_do_not_change_features(shelf, monkeypatch):
    frames = slide(5, 40, 50, 4)
    for network in (
        Dino(str(shelf.find(weights.DINO)), CPU),
        Clip(str(shelf.find(weights.CLIP_B)), CPU),
    ):
        whole = network(frames)
        monkeypatch.setattr(extractors, "BATCH", 2)
        torch.testing.assert_close(network(frames), whole, atol=1e-5, rtol=1e-5)
        monkeypatch.undo()


def test_clip_equals_its_own_model(shelf):
    frames, source = slide(3, 40, 50, 4), str(shelf.find(weights.CLIP_B))
    clip = Clip(source, CPU)
    model = transformers.CLIPModel.from_pretrained(source).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(source)(
        ["oil painting"], return_tensors="pt"
    )
    with torch.no_grad():
        pixels = transforms.for_clip_as_pictures(frames, SIDE)
        output = model(
            pixel_values=pixels,
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
        )
    found = measures.style(
        clip(frames, transforms.for_clip_as_pictures), clip.text("oil painting"), clip.logit_scale
    )
    assert found.value == pytest.approx(float(output.logits_per_text[0].mean()) / 100, abs=1e-6)
    assert found.value != pytest.approx(
        measures.style(
            clip(frames, transforms.for_clip_as_pictures), clip.text("cubism"), clip.logit_scale
        ).value,
        abs=1e-4,
    )


def test_weights_of_another_family_or_torn_ones_are_refused(shelf, tmp_path):
    with pytest.raises(CheckpointError, match="holds a 'clip' model where 'vit'"):
        Dino(str(shelf.find(weights.CLIP_B)), CPU)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(CheckpointError, match="cannot be loaded as a vit model"):
        Dino(str(tmp_path), CPU)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Clip(str(tmp_path / "none"), CPU)


def test_bilinear_and_bicubic_are_not_antialiased():
    # A column of white in 64: without antialiasing most columns are never looked at.
    frames = np.zeros((1, 64, 64, 3), np.uint8)
    frames[:, :, 10] = 255
    small = transforms.resize(transforms.pixels_of(frames), 8, "bilinear")
    assert small.max() == 0
    small = transforms.resize(transforms.pixels_of(frames), 32, "bicubic")
    assert small.min() < 0  # overshoot stays


def test_dino_is_resized_bilinearly_on_floats():
    frames = slide(2, 40, 60, 4)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    plain = functional.interpolate(pixels, (32, 48), mode="bilinear", align_corners=False) / 255
    mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    torch.testing.assert_close(transforms.for_dino(frames, 32), (plain - mean) / std)


def test_dynamic_degree_takes_eight_frames_a_second_and_the_fastest_twentieth(monkeypatch):
    asked = []

    def magnitudes(self, frames, *, share, both_ends):
        asked.append((frames[:, 0, 0, 0].tolist(), share, both_ends))
        return [0.0]

    monkeypatch.setattr(Tools, "magnitudes", magnitudes)
    frames = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    measure = DIMENSIONS["v1"]["dynamic_degree"].measure
    assert measure is not None
    # Of four kept frames one pair has to move, and none does.
    assert measure(Footage(frames, 24.0, {}), Tools(Shelf(), CPU)).value == 0
    assert asked == [([0, 3, 6, 9], 0.05, False)]


def test_a_frame_of_the_right_size_is_left_alone():
    frames = slide(2, 32, 48, 4)
    pixels = transforms.pixels_of(frames)
    assert transforms.resize(pixels, 32, "bicubic") is pixels
    assert torch.equal(transforms.centre_crop(pixels, 32), pixels[:, :, :, 8:40])
    assert transforms.shorter_side(100, 151, 224) == (224, 338)
    assert transforms.shorter_side(151, 100, 224) == (338, 224)


def test_dino_sees_the_whole_frame_and_clip_its_middle():
    frames = slide(1, 50, 100, 0)
    assert transforms.for_dino(frames).shape == (1, 3, 224, 448)
    assert transforms.for_clip(frames).shape == (1, 3, 224, 224)
    white = np.full((1, 50, 100, 3), 255, np.uint8)
    for transform, mean, std in (
        (transforms.for_dino, 0.485, 0.229),
        (transforms.for_clip, 0.48145466, 0.26862954),
    ):
        torch.testing.assert_close(
            transform(white)[0, 0], torch.full_like(transform(white)[0, 0], (1 - mean) / std)
        )


@pytest.mark.parametrize("size", [(300, 400), (100, 130)])
def test_pictures_for_style_are_resized_as_pil_does_it(size):
    chance = np.random.default_rng(0)
    frame = chance.integers(0, 256, (*size, 3), dtype=np.uint8)
    height, width = transforms.shorter_side(*size, 224)
    resized = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    left = round((width - 224) / 2)
    expected = torch.from_numpy(resized[:, left : left + 224].copy()).permute(2, 0, 1).float()
    found = transforms.for_clip_as_pictures(frame[None])[0]
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
    assert ((found * std + mean) * 255 - expected).abs().max() <= 1e-3


def test_all_of_tier_b_is_measured_where_its_weights_are(shelf, tmp_path, fill):
    frames = {f"v{i}.mp4": slide(4, 128, 160, 8 * i, seed=i) for i in range(2)}
    folder = fill(tmp_path / "v", frames)
    config = SUITE.config.model_validate({"mode": "custom", "weights_dir": str(shelf.folder)})
    scores = SUITE.run(Subject(videos=folder), config, tmp_path / "out", lambda *stage: None)
    results = json.loads((tmp_path / "out/vbench_eval_results.json").read_text())
    assert set(results) == {
        "subject_consistency",
        "background_consistency",
        "temporal_flickering",
        "dynamic_degree",
        "aesthetic_quality",
    }
    clips = [read_clip(folder / name).frames for name in sorted(frames)]
    tools = Tools(shelf, CPU)
    expected = {
        "subject_consistency": [measures.consistency(tools.dino(c)).value for c in clips],
        "background_consistency": [measures.consistency(tools.clip_b(c)).value for c in clips],
        "aesthetic_quality": [
            measures.aesthetic(tools.clip_l(c), *tools.aesthetic_head).value for c in clips
        ],
    }
    for name, values in expected.items():
        assert [row["video_results"] for row in results[name][1]] == pytest.approx(values, abs=1e-6)
        assert results[name][0] == pytest.approx(np.mean(values), abs=1e-6)
        assert scores["vbench"][name]["mean"] == results[name][0]
    assert all(isinstance(r["video_results"], bool) for r in results["dynamic_degree"][1])
    assert set(scores["settings"]["skipped"]) == {"motion_smoothness", "imaging_quality"}


def test_flow_filters_what_moves_from_flickering(shelf, tmp_path, fill, monkeypatch):
    prompt = "In a still frame, a stop sign"
    videos = {f"{prompt}-{i}.mp4": slide(3, 128, 128, 0 if i % 2 else 9, seed=i) for i in range(4)}
    folder = fill(tmp_path / "v", videos)
    # Random weights see no motion; what is tested is that the filter's verdicts decide.
    still = lambda self, frames, *, share, both_ends: (  # noqa: E731
        [0.0 if np.abs(frames[0].astype(int) - frames[1]).mean() < 5 else 99.0] * len(frames)
        if both_ends and share == 0.02
        else [0.0]
    )
    monkeypatch.setattr(Tools, "magnitudes", still)
    config = SUITE.config.model_validate(
        {"dimensions": ["temporal_flickering"], "weights_dir": str(shelf.folder)}
    )
    scores = SUITE.run(Subject(videos=folder), config, tmp_path / "out", lambda *stage: None)
    rows = json.loads((tmp_path / "out/vbench_eval_results.json").read_text())
    kept = [row["video_path"].rsplit("/")[-1] for row in rows["temporal_flickering"][1]]
    fewer = config.model_copy(update={"samples_per_prompt": 1})
    scores_of_one = SUITE.run(Subject(videos=folder), fewer, tmp_path / "one", lambda *stage: None)
    assert scores_of_one["vbench"]["temporal_flickering"]["n"] == 1
    assert kept == [f"{prompt}-1.mp4", f"{prompt}-3.mp4"]
    assert not any("without the static filter" in t for t in scores["settings"]["warnings"])


def test_videos_too_small_for_flow_skip_dynamic_degree_and_the_filter(shelf, tmp_path, fill):
    folder = fill(
        tmp_path / "v",
        {
            "In a still frame, a stop sign-0.mp4": slide(3, 64, 64, 0),
            "a person swimming in ocean-0.mp4": slide(3, 64, 64, 4),
        },
    )
    config = SUITE.config.model_validate(
        {"dimensions": ["temporal_flickering", "dynamic_degree"], "weights_dir": str(shelf.folder)}
    )
    scores = SUITE.run(Subject(videos=folder), config, tmp_path / "out", lambda *stage: None)
    assert "64x64 are too small for optical flow" in scores["settings"]["skipped"]["dynamic_degree"]
    assert scores["vbench"]["temporal_flickering"]["n"] == 1
    assert any("without the static filter" in t for t in scores["settings"]["warnings"])
