"""The adversary: patches of any clip, hinge losses, and gradients that stay with their player."""

import pytest
import torch
from torch.testing import assert_close

from opensora.errors import UsageError
from opensora.vae.discriminator import (
    PatchDiscriminator,
    discriminator_term,
    generator_term,
    idle_term,
)


@pytest.fixture
def discriminator():
    torch.manual_seed(0)
    return PatchDiscriminator(width=4, depth=3)


@pytest.mark.parametrize(
    ("size", "scores"),
    [((1, 16, 16), (1, 2, 2)), ((17, 24, 40), (5, 3, 5)), ((4, 8, 9), (1, 1, 1))],
)
def test_it_scores_the_patches_of_any_clip(discriminator, size, scores):
    assert discriminator(torch.zeros(2, 3, *size)).shape == (2, *scores)


def test_a_score_sees_its_patch_only(discriminator):
    videos = torch.zeros(2, 3, 1, 64, 64, requires_grad=True)
    discriminator(videos)[0, 0, 0, 0].backward()
    assert not videos.grad[1].any()
    rows, columns = videos.grad[0].abs().sum(dim=(0, 1)).nonzero().unbind(1)
    # Three strided 3x3 convolutions, padded on the far side, and a 3x3 head: 1 + 2 + 4 + 8 + 8.
    assert rows.max() < 23
    assert columns.max() < 23


def test_hinge_values(discriminator):
    class Scores(torch.nn.Module):
        """Scores a clip by its first value."""

        def forward(self, videos):
            return videos[:, :1, 0, 0, 0]

    def clips(*values):
        return torch.tensor(values).view(-1, 1, 1, 1, 1)

    assert generator_term(Scores(), clips(2.0, -3.0)).tolist() == [-2, 3]
    reals, fakes = clips(2.0, 0.5, -1.0), clips(-2.0, 0.0, 1.0)
    assert discriminator_term(Scores(), fakes, reals).tolist() == [0, 0.75, 2]


def test_each_players_gradient_reaches_that_player_only(discriminator):
    fakes = torch.randn(2, 3, 5, 16, 16, requires_grad=True)
    generator_term(discriminator, fakes).sum().backward()
    assert fakes.grad.any()
    assert all(p.grad is None for p in discriminator.parameters())
    fakes.grad = None
    discriminator_term(discriminator, fakes, torch.randn(2, 3, 5, 16, 16)).sum().backward()
    assert fakes.grad is None
    # The head's bias alone may have none: it lifts real and fake scores alike.
    without = [name for name, p in discriminator.named_parameters() if not p.grad.any()]
    assert without in ([], ["head.bias"])


def test_the_generators_gradient_is_that_of_the_plain_score(discriminator):
    fakes = torch.randn(2, 3, 5, 16, 16, requires_grad=True)
    (ours,) = torch.autograd.grad(generator_term(discriminator, fakes).sum(), fakes)
    plain = -discriminator(fakes).flatten(1).mean(dim=1).sum()
    assert_close(ours, torch.autograd.grad(plain, fakes)[0], rtol=0, atol=0)


def test_while_idle_every_parameter_has_a_zero_gradient(discriminator):
    idle = idle_term(discriminator)
    idle.backward()
    assert idle == 0
    assert all(p.grad is not None and not p.grad.any() for p in discriminator.parameters())


def test_too_small_pictures_are_refused(discriminator):
    with pytest.raises(UsageError, match="at least 8 pixels, found 4x16"):
        discriminator(torch.zeros(1, 3, 5, 4, 16))
