"""The autoencoder's loss: closed forms, zeros where they belong, one backward for both players."""

import pydantic
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from opensora.vae.discriminator import discriminator_term, generator_term
from opensora.vae.losses import (
    AutoencoderLoss,
    AutoencoderLossConfig,
    kl_to_standard_normal,
    laplacian_distance,
)
from opensora.vae.perceptual import PerceptualDistance

ADVERSARIAL = {"weight": 0.3, "start": 10, "width": 4, "depth": 2}


@pytest.fixture
def batch():
    """(reconstruction, pixels, mean, log_variance) of two clips."""
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    reconstruction = (pixels + 0.1 * torch.randn_like(pixels)).requires_grad_()
    mean, log_variance = torch.randn(2, 2, 4, 2, 2, 2).unbind(0)
    return reconstruction, pixels, mean.requires_grad_(), log_variance.requires_grad_()


def test_kl_is_the_closed_form():
    torch.manual_seed(0)
    mean, log_variance = torch.randn(2, 3, 4, 2, 5, 6, dtype=torch.float64)
    exact = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    expected = exact.sum(dim=1).mean(dim=(1, 2, 3))
    assert_close(kl_to_standard_normal(mean, log_variance), expected, rtol=1e-12, atol=0)
    assert kl_to_standard_normal(torch.zeros(1, 4, 1, 2, 2), torch.zeros(1, 4, 1, 2, 2)) == 0


def test_kl_does_not_depend_on_the_size_of_the_clip():
    mean, log_variance = torch.randn(2, 1, 4, 1, 1, 1)
    small = kl_to_standard_normal(mean, log_variance)
    large = kl_to_standard_normal(mean.expand(1, 4, 3, 8, 8), log_variance.expand(1, 4, 3, 8, 8))
    assert_close(small, large)


def test_laplacian_ignores_shading_and_counts_edges():
    rows = torch.arange(32.0).view(1, 1, 1, 32, 1).expand(1, 3, 1, 32, 32)
    assert laplacian_distance(torch.ones(1, 3, 2, 32, 32)).abs() < 1e-6
    # A slope is bent in three rows at each end: by 20/32, 3/32 and 1/32 of a step.
    assert_close(laplacian_distance(rows, scales=1), torch.tensor([2 * 24 / 32 / 32]))
    edge = (rows >= 16).float()
    blurred_edge = ((rows - 8) / 16).clamp(0, 1)
    assert laplacian_distance(edge) > 2 * laplacian_distance(blurred_edge)


def test_laplacian_is_homogeneous_and_per_sample():
    torch.manual_seed(0)
    difference = torch.randn(2, 3, 3, 19, 22)
    both = laplacian_distance(difference)
    assert_close(laplacian_distance(difference * 3), both * 3)
    assert_close(laplacian_distance(difference[1:]), both[1:])
    assert laplacian_distance(torch.randn(1, 3, 1, 3, 3)) == 0


def test_a_perfect_reconstruction_costs_nothing(batch):
    _, pixels, mean, _ = batch
    criterion = AutoencoderLoss(AutoencoderLossConfig(l1=1, l2=1, laplacian=1, kl=1))
    nothing = torch.zeros_like(mean)
    loss, metrics = criterion(pixels, pixels, nothing, nothing, 0)
    assert loss.tolist() == [0, 0]
    assert {name: value.item() for name, value in metrics.items()} == dict.fromkeys(
        ["l1", "l2", "laplacian", "kl"], 0
    )


def test_the_loss_is_the_weighted_sum_per_sample(batch):
    reconstruction, pixels, mean, log_variance = batch
    config = AutoencoderLossConfig(l1=0.5, l2=2.0, laplacian=0.1, kl=1e-3)
    loss, metrics = AutoencoderLoss(config)(*batch, 0)
    difference = reconstruction - pixels
    expected = (
        0.5 * difference.abs().mean(dim=(1, 2, 3, 4))
        + 2.0 * difference.square().mean(dim=(1, 2, 3, 4))
        + 0.1 * laplacian_distance(difference)
        + 1e-3 * kl_to_standard_normal(mean, log_variance)
    )
    assert_close(loss, expected)
    assert_close(metrics["l1"], difference.detach().abs().mean())
    assert not any(value.requires_grad for value in metrics.values())


def test_a_sample_does_not_feel_its_batch(batch):
    config = AutoencoderLossConfig(laplacian=1, adversarial={**ADVERSARIAL, "start": 0})
    criterion = AutoencoderLoss(config)
    together, _ = criterion(*batch, 0)
    alone, _ = criterion(*(tensor[1:] for tensor in batch), 0)
    assert_close(together[1:], alone)


def test_kl_is_measured_even_where_it_does_not_count(batch):
    loss, metrics = AutoencoderLoss(AutoencoderLossConfig(kl=0))(*batch, 0)
    assert metrics["kl"] > 0
    loss.sum().backward()
    assert batch[2].grad is None


def test_before_the_start_the_adversary_is_silent_but_present(batch):
    plain, _ = AutoencoderLoss(AutoencoderLossConfig())(*batch, 9)
    criterion = AutoencoderLoss(AutoencoderLossConfig(adversarial=ADVERSARIAL))
    loss, metrics = criterion(*batch, 9)
    assert torch.equal(loss, plain)
    assert "generator" not in metrics
    loss.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in criterion.parameters())


def test_one_backward_serves_both_players(batch):
    reconstruction, pixels, *_ = batch
    criterion = AutoencoderLoss(AutoencoderLossConfig(adversarial=ADVERSARIAL))
    discriminator = criterion.discriminator
    parameters = list(criterion.parameters())
    loss, metrics = criterion(*batch, 10)
    together = torch.autograd.grad(loss.sum(), [reconstruction, *parameters])

    fidelity = AutoencoderLoss(AutoencoderLossConfig())(*batch, 10)[0]
    generator = generator_term(discriminator, reconstruction)
    expected = torch.autograd.grad((fidelity + 0.3 * generator).sum(), reconstruction)
    assert_close(together[0], expected[0])
    adversary = discriminator_term(discriminator, reconstruction, pixels)
    for ours, theirs in zip(
        together[1:], torch.autograd.grad(adversary.sum(), parameters), strict=True
    ):
        assert_close(ours, theirs)
    assert_close(metrics["generator"], generator.detach().mean())
    assert_close(metrics["discriminator"], adversary.detach().mean())


def test_the_players_learn_against_each_other():
    """The discriminator learns to tell grey from bright; the generator then leaves the grey."""
    torch.manual_seed(0)
    criterion = AutoencoderLoss(
        AutoencoderLossConfig(l1=1e-3, adversarial={**ADVERSARIAL, "start": 0, "weight": 1.0})
    )
    pixels = torch.full((2, 3, 1, 8, 8), 0.8)
    bias = torch.zeros(3, 1, 1, 1, requires_grad=True)
    posterior = torch.zeros(2, 2, 1, 1, 1)
    optimizer = torch.optim.Adam([*criterion.parameters(), bias], lr=1e-2)
    history = []
    for step in range(40):
        loss, metrics = criterion(bias + 0 * pixels, pixels, posterior, posterior, step)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        history.append(metrics["discriminator"].item())
    assert min(history) < 0.5 * history[0]
    assert bias.mean() > 0.2


def test_the_perceptual_term_comes_from_the_configured_weights(batch, monkeypatch):
    network = PerceptualDistance()
    asked = {}

    def load(**paths):
        asked.update(paths)
        return network

    monkeypatch.setattr("opensora.vae.losses.load_perceptual", load)
    config = AutoencoderLossConfig(
        kl=0, perceptual={"weight": 0.25, "vgg": "a.safetensors", "heads": "b.pth"}
    )
    loss, metrics = AutoencoderLoss(config)(*batch, 0)
    assert asked == {"vgg": "a.safetensors", "heads": "b.pth"}
    distance = network.of_videos(batch[0], batch[1])
    assert_close(loss, (batch[0] - batch[1]).abs().mean(dim=(1, 2, 3, 4)) + 0.25 * distance)
    assert_close(metrics["perceptual"], distance.detach().mean())


def test_the_perceptual_network_is_neither_trained_nor_saved(batch, monkeypatch):
    monkeypatch.setattr("opensora.vae.losses.load_perceptual", lambda **_: PerceptualDistance())
    criterion = AutoencoderLoss(AutoencoderLossConfig(perceptual={"vgg": "a", "heads": "b"}))
    assert not list(criterion.parameters())
    assert not criterion.state_dict()


def test_a_surrounding_autocast_does_not_round_the_pixel_terms(batch):
    criterion = AutoencoderLoss(AutoencoderLossConfig(l2=1, laplacian=1))
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = criterion(*batch, 0)
    assert torch.equal(inside, criterion(*batch, 0)[0])


def test_half_precision_reconstructions_are_judged_in_float32(batch):
    reconstruction, pixels, mean, log_variance = batch
    loss, _ = AutoencoderLoss(AutoencoderLossConfig())(
        reconstruction.bfloat16(), pixels, mean.bfloat16(), log_variance.bfloat16(), 0
    )
    assert loss.dtype == torch.float32


def test_something_must_set_the_colours():
    with pytest.raises(pydantic.ValidationError, match="l1 and l2 are both 0"):
        AutoencoderLossConfig(l1=0, laplacian=1)
