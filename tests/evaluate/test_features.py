"""Networks that turn videos into vectors, on tiny random weights in the public layouts."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from opensora.errors import UsageError
from opensora.evaluate.features import ExtractorConfig, build, square

CPU = torch.device("cpu")


def videos(count: int = 2, frames: int = 16, height: int = 40, width: int = 56) -> Tensor:
    chance = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, frames, height, width, 3), generator=chance).byte()


class Told(nn.Module):
    """Stands in for the I3D file: answers with what it was given."""

    def forward(
        self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        flags = torch.tensor([float(rescale), float(resize), float(return_features)])
        size = torch.tensor([float(x.shape[1]), float(x.shape[3]), float(x.shape[4])])
        ends = torch.stack([x.min(), x.max()])
        return torch.cat([flags, size, ends]).expand(x.shape[0], 8)


@pytest.fixture(scope="module")
def i3d(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("i3d") / "i3d.pt"
    with warnings.catch_warnings(action="ignore"):  # torch.jit is deprecated, and the file is that
        torch.jit.save(torch.jit.script(Told()), path)
    return str(path)


@pytest.mark.parametrize(
    ("convention", "told"),
    [
        ("stylegan_v", [1, 1, 1, 3, 40, 56, 0, 255]),
        ("common_metrics", [0, 0, 1, 3, 224, 224, -1, 1]),
        ("cdfvd", [0, 0, 1, 3, 224, 224, -1, 1]),
    ],
)
def test_i3d_gets_what_each_convention_gives_it(i3d, convention, told):
    config = ExtractorConfig(kind="i3d", path=i3d, convention=convention)
    clip = videos()
    clip[:, 0, 20, 28], clip[:, 0, 19, 27] = 255, 0
    clip[:, :, 19:21, 27:29] = 0  # an area, since enlarging mixes neighbours
    clip[:, 0, 22:25, 30:33] = 255
    found = build(config, CPU, 16)(clip)
    assert found.shape == (2, 8)
    assert found[0].tolist() == pytest.approx(told, abs=1e-4)


def test_i3d_refuses_short_clips_and_files_that_are_none(i3d, tmp_path):
    with pytest.raises(UsageError, match="i3d takes 10 frames or more, the clips have 9"):
        build(ExtractorConfig(kind="i3d", path=i3d), CPU, 9)
    (tmp_path / "weights.pt").write_bytes(b"none")
    for path in (tmp_path / "weights.pt", tmp_path / "absent.pt"):
        with pytest.raises(UsageError, match="cannot be read"):
            build(ExtractorConfig(kind="i3d", path=str(path)), CPU, 16)


def test_a_square_is_the_centre_or_everything_stretched():
    clip = torch.zeros(1, 2, 20, 40, 3, dtype=torch.uint8)
    clip[:, :, :, :10] = 255  # a left quarter that the centre crop leaves out
    assert square(clip, 10, "common_metrics").max() == 0
    stretched = square(clip, 10, "cdfvd")
    assert stretched.shape == (1, 3, 2, 10, 10)
    assert stretched.mean() == pytest.approx(0.25)
    tall = clip.transpose(2, 3)
    torch.testing.assert_close(square(tall, 10, "cdfvd"), stretched.transpose(3, 4))


def test_square_pictures_are_the_same_in_both_conventions():
    clip = videos(height=48, width=48)
    torch.testing.assert_close(square(clip, 32, "common_metrics"), square(clip, 32, "cdfvd"))


def test_the_random_network_is_the_same_everywhere_and_sees_time():
    extract = build(ExtractorConfig(channels=16), CPU, 16)
    clip = videos()
    found = extract(clip)
    assert found.shape == (2, 16)
    again = build(ExtractorConfig(channels=16), CPU, 16)(clip)
    torch.testing.assert_close(found, again, rtol=0, atol=0)
    one = extract(clip[:1])
    torch.testing.assert_close(one, found[:1])
    assert (extract(clip.flip(1)) - found).abs().max() > 1e-3  # time reversed


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, str]:
    """Tiny random models as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "intermediate_size": 32, "patch_size": 16,
    }  # fmt: skip
    vjepa = {
        "crop_size": 32, "frames_per_clip": 16, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "pred_hidden_size": 16, "pred_num_hidden_layers": 1,
        "pred_num_attention_heads": 2,
    }  # fmt: skip
    models = {
        "videomae": transformers.VideoMAEModel(transformers.VideoMAEConfig(**sizes)),
        "vjepa2": transformers.VJEPA2Model(transformers.VJEPA2Config(**vjepa)),
        "clip": transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**sizes, projection_dim=8)
        ),
    }
    root = tmp_path_factory.mktemp("extractors")
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: str(root / name) for name in models}


@pytest.mark.parametrize(("kind", "width"), [("videomae", 16), ("vjepa2", 16), ("clip", 8)])
def test_transformers_models_give_features_of_whole_videos(families, kind, width):
    config = ExtractorConfig(kind=kind, path=families[kind])
    clip = videos()
    with torch.no_grad():
        extract = build(config, CPU, 16)
        found = extract(clip)
        torch.testing.assert_close(extract(clip[1:]), found[1:], rtol=1e-4, atol=1e-5)
    assert found.shape == (2, width)
    assert (found[0] - found[1]).abs().max() > 0
    assert config.metric == f"fvd_{kind}"


def test_clips_features_are_the_mean_of_its_frames(families):
    transformers = pytest.importorskip("transformers")
    clip = videos(count=1, frames=3, height=32, width=32)
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(families["clip"])
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    frames = (clip[0].permute(0, 3, 1, 2) / 255 - mean) / deviation
    with torch.no_grad():
        expected = model(pixel_values=frames).image_embeds.mean(0)
        found = build(ExtractorConfig(kind="clip", path=families["clip"]), CPU, 3)(clip)[0]
    torch.testing.assert_close(found, expected)


def test_videomae_refuses_another_length_and_a_folder_that_is_no_model(families, tmp_path):
    with pytest.raises(UsageError, match="takes 16 frames, the clips have 8"):
        build(ExtractorConfig(kind="videomae", path=families["videomae"]), CPU, 8)
    with pytest.raises(UsageError, match="cannot be loaded"):
        build(ExtractorConfig(kind="clip", path=str(tmp_path)), CPU, 8)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "i3d"}, "needs extractor.path"),
        ({"kind": "random_conv3d", "path": "x"}, "takes no path"),
        ({"convention": "stylegan_v"}, "of the i3d file alone"),
        ({"kind": "clip", "path": "x", "side": 32}, "of random_conv3d alone"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        ExtractorConfig.model_validate(settings)


def test_only_i3d_gives_an_fvd():
    assert ExtractorConfig(kind="i3d", path="x").metric == "fvd"
    assert ExtractorConfig().metric == "rfvd"
