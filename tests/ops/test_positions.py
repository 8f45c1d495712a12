"""Positions: rotations keep lengths and tell distances, sinusoids tell cells apart."""

import pytest
import torch
from torch.testing import assert_close

from opensora.ops.positions import rotary_phases, rotate, sincos_2d, sinusoid

ANGLE_ERROR = 1e-4
"""float32 angles of up to 1000 radians are off by 1000 * 6e-8, sines and cosines as much."""


def test_a_sinusoid_is_cosines_then_sines_of_geometric_frequencies():
    positions = torch.tensor([0.0, 1.0, 2.5, 1000.0])
    code = sinusoid(positions, 8)
    for i in range(4):
        angle = positions.double() * 10_000.0 ** (-i / 4)
        assert_close(code[:, i].double(), angle.cos(), rtol=0, atol=ANGLE_ERROR)
        assert_close(code[:, 4 + i].double(), angle.sin(), rtol=0, atol=ANGLE_ERROR)
    assert sinusoid(torch.zeros(2, 3), 6).shape == (2, 3, 6)
    with pytest.raises(ValueError, match="width 7 must be even"):
        sinusoid(positions, 7)


def test_every_cell_of_a_grid_has_its_own_code_row_by_row():
    rows, columns = torch.arange(3.0), torch.arange(5.0)
    code = sincos_2d(rows, columns, 16)
    assert code.shape == (15, 16)
    distances = torch.cdist(code, code) + torch.eye(15) * 9
    assert distances.min() > 0.1
    by_row, by_column = code.view(3, 5, 16)[..., 8:], code.view(3, 5, 16)[..., :8]
    assert torch.equal(by_row, sinusoid(rows, 8)[:, None].expand(3, 5, 8))
    assert torch.equal(by_column, sinusoid(columns, 8)[None].expand(3, 5, 8))
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_2d(rows, columns, 6)


def positions_of(*places: float) -> torch.Tensor:
    """(L, 1): places on one axis."""
    return torch.tensor(places)[:, None]


def test_rotation_is_multiplication_by_a_phase():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    positions = positions_of(0.0, 1.0, 5.0, 40.0)
    turned = rotate(x, rotary_phases(positions, (8,)))
    angles = positions.double() * 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    pairs = x.unflatten(-1, (4, 2))  # B L K d/2 2
    cosine, sine = angles.cos()[:, None], angles.sin()[:, None]  # L 1 d/2
    real = pairs[..., 0] * cosine - pairs[..., 1] * sine
    imaginary = pairs[..., 0] * sine + pairs[..., 1] * cosine
    expected = torch.stack([real, imaginary], dim=-1).flatten(-2)
    assert_close(turned, expected, rtol=0, atol=ANGLE_ERROR)
    assert torch.equal(turned[:, 0], x[:, 0])


def test_each_axis_turns_its_own_features_and_the_rest_stay():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 2, 12, dtype=torch.float64)
    places = torch.cartesian_prod(torch.arange(2.0), torch.arange(3.0))  # 6 2
    turned = rotate(x, rotary_phases(places, (4, 6)))
    for axis, features in enumerate([slice(0, 4), slice(4, 10)]):
        size = features.stop - features.start
        alone = rotate(x[..., features], rotary_phases(places[:, axis, None], (size,)))
        assert_close(turned[..., features], alone, rtol=0, atol=1e-6)
    assert torch.equal(turned[..., 10:], x[..., 10:])


def test_rotation_keeps_norms():
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    turned = rotate(x, rotary_phases(torch.arange(7)[:, None] * 100, (8,)))
    # The squares of a float32 cosine and sine add up to one within 2 * 6e-8.
    assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=2e-7, atol=0)


def test_half_precision_is_rotated_in_float32():
    x = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    phases = rotary_phases(positions_of(0.0, 1.0, 50.0, 51.0, 1000.0), (8,))
    turned = rotate(x, phases)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), phases).bfloat16())


def test_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def product(at: float, to: float) -> float:
        a, b = (rotary_phases(positions_of(place), (16,)) for place in (at, to))
        return float((rotate(q, a) * rotate(k, b)).sum())

    assert product(3.0, 8.0) == pytest.approx(product(103.0, 108.0), abs=1e-4)
    assert product(3.0, 8.0) == pytest.approx(product(0.0, 5.0), abs=1e-5)
    assert product(3.0, 8.0) != pytest.approx(product(8.0, 3.0), abs=1e-2)
