"""The straight line: its formulas, and data prediction under the velocity loss."""

import torch

from opensora.diffusion.flow import Flow, FlowConfig


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_x_t_lies_on_the_straight_line_and_velocity_is_noise_minus_data():
    data = torch.randn(2, 3, 4, 2, 2, generator=seeded(1))
    noise = torch.randn(2, 3, 4, 2, 2, generator=seeded(2))
    t = torch.rand(2, 4, generator=seeded(3))
    frame = t[:, None, :, None, None]
    # One rounding of each product and of the sum, of numbers below 6.
    torch.testing.assert_close(
        Flow().corrupt(data, noise, t), (1 - frame) * data + frame * noise, rtol=0, atol=1e-6
    )
    assert torch.equal(Flow().velocity(data, noise, t), noise - data)


def test_level_one_is_exactly_the_noise():
    data, noise = torch.randn(2, 1, 3, 2, 3, 3, generator=seeded(1))
    assert torch.equal(Flow().corrupt(data, noise, torch.ones(1, 2)), noise)


def test_data_prediction_with_velocity_loss_is_jit():
    """Li and He 2025: the squared error of the data over max(t, 0.05)^2, in our time."""
    flow = Flow(FlowConfig(prediction="data"))
    t = torch.tensor([[0.0, 0.01, 0.05, 0.2, 1.0]])
    expected = 1 / torch.tensor([[0.05, 0.05, 0.05, 0.2, 1.0]]) ** 2
    torch.testing.assert_close(flow.loss_weight(t), expected, rtol=1e-6, atol=0)
    x = torch.randn(1, 2, 5, 1, 1, generator=seeded(1))
    guess = torch.randn(1, 2, 5, 1, 1, generator=seeded(2))
    velocity = (x - guess) / torch.tensor([0.05, 0.05, 0.05, 0.2, 1.0])[:, None, None]
    torch.testing.assert_close(flow.to_velocity(guess, x, t), velocity, rtol=1e-6, atol=1e-6)


def test_velocity_prediction_and_loss_weigh_every_level_alike():
    assert (Flow().loss_weight(torch.linspace(0, 1, 11)) == 1).all()
