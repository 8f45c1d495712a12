"""LPIPS: the published formula on public layouts of weights, read from local files only."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from opensora.errors import UsageError
from opensora.vae.perceptual import PerceptualDistance, load_perceptual

STAGES = (4, 9, 16, 23, 30)
"""Where lpips cuts torchvision's `vgg16().features`: after each stage's last ReLU."""


def torchvision_layers() -> nn.Sequential:
    """`vgg16().features` of torchvision, layer for layer, with its indices as names."""
    layers, before = [], 3
    for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", *(512, 512, 512, "M") * 2):
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
    return nn.Sequential(*layers)


def published_lpips(vgg: nn.Sequential, heads: list[torch.Tensor], a, b) -> torch.Tensor:
    """Zhang et al. 2018, equation 1, written from the paper: features, unit length, heads."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    x, y, total, start = (a - shift) / scale, (b - shift) / scale, 0, 0
    for stop, head in zip(STAGES, heads, strict=True):
        for layer in vgg[start:stop]:
            x, y = layer(x), layer(y)
        unit = [f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (x, y)]
        difference = nn.functional.conv2d((unit[0] - unit[1]) ** 2, head)
        total = total + difference.mean(dim=(1, 2, 3))
        start = stop
    return total


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in both files: (torchvision's layers, lpips' heads, their paths)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lpips")
    vgg = torchvision_layers().requires_grad_(False)
    for layer in vgg:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.normal_(layer.bias, std=0.1)
    heads = [torch.rand(1, width, 1, 1) for width in (64, 128, 256, 512, 512)]
    state = {f"features.{name}": tensor for name, tensor in vgg.state_dict().items()}
    state["classifier.0.weight"] = torch.zeros(3)
    save_file(state, folder / "vgg16.safetensors")
    torch.save({f"lin{i}.model.1.weight": head for i, head in enumerate(heads)}, folder / "vgg.pth")
    return vgg, heads, {"vgg": folder / "vgg16.safetensors", "heads": folder / "vgg.pth"}


@pytest.fixture(scope="module")
def network(weights):
    return load_perceptual(**weights[2])


def test_it_is_the_published_formula(weights, network):
    torch.manual_seed(1)
    a, b = torch.rand(2, 2, 3, 37, 32) * 2 - 1
    expected = published_lpips(weights[0], weights[1], a, b)
    # float32 through 13 convolutions: a relative error of some 1e-6 a feature, averaged.
    assert_close(network(a, b), expected, rtol=1e-4, atol=0)


def test_a_video_is_the_mean_of_its_frames(network):
    torch.manual_seed(1)
    a, b = torch.rand(2, 2, 3, 3, 16, 16) * 2 - 1
    frames = torch.stack([network(a[:, :, f], b[:, :, f]) for f in range(3)])
    assert_close(network.of_videos(a, b), frames.mean(0), rtol=1e-5, atol=0)


def test_identical_pictures_are_at_distance_zero_and_others_are_not(network):
    torch.manual_seed(1)
    a = torch.rand(2, 3, 16, 16)
    assert network(a, a).tolist() == [0, 0]
    assert (network(a, a.flip(-1)) > 0).all()


def test_the_gradient_reaches_pictures_only_and_is_finite_even_without_features(network):
    pictures = torch.zeros(1, 3, 16, 16, requires_grad=True)
    references = torch.ones(1, 3, 16, 16, requires_grad=True)
    network(pictures, references).sum().backward()
    assert pictures.grad.any()
    assert references.grad is None
    assert not any(p.requires_grad for p in network.parameters())
    dead = PerceptualDistance()
    for convolution in dead.convolutions:
        nn.init.constant_(convolution.bias, -100.0)
    pictures.grad = None
    distance = dead(pictures, references)
    assert distance == 0
    distance.sum().backward()
    assert pictures.grad.isfinite().all()


def test_too_small_pictures_are_refused(network):
    with pytest.raises(UsageError, match="at least 16 pixels, found 8x16"):
        network(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))


def test_absent_wrong_and_hostile_files_are_refused(weights, tmp_path):
    paths = weights[2]
    with pytest.raises(UsageError, match=r"absent\.pth cannot be read .*torchvision's vgg16"):
        load_perceptual(vgg=tmp_path / "absent.pth", heads=paths["heads"])
    with pytest.raises(UsageError, match=r"no tensor 'features\.0\.weight'"):
        load_perceptual(vgg=paths["heads"], heads=paths["heads"])
    torch.save({"lin0.model.1.weight": torch.zeros(1, 3, 1, 1)}, tmp_path / "heads.pth")
    with pytest.raises(UsageError, match=r"shape \(1, 3, 1, 1\), \(1, 64, 1, 1\) is expected"):
        load_perceptual(vgg=paths["vgg"], heads=tmp_path / "heads.pth")
    (tmp_path / "torn.safetensors").write_bytes(paths["vgg"].read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot be read"):
        load_perceptual(vgg=tmp_path / "torn.safetensors", heads=paths["heads"])
    hostile = pickle.dumps(Hostile(str(tmp_path / "ran")), protocol=2)
    (tmp_path / "code.pth").write_bytes(hostile)
    with pytest.raises(UsageError, match="cannot be read"):
        load_perceptual(vgg=tmp_path / "code.pth", heads=paths["heads"])
    assert not (tmp_path / "ran").exists()


class Hostile:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")
