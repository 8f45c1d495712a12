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


def test_rotation_is_multiplication_by_a_phase():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    positions = torch.tensor([0.0, 1.0, 5.0, 40.0])
    turned = rotate(x, rotary_phases((positions)[:, None], (8,)))
    frequencies = 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    phases = torch.exp(1j * positions.double()[:, None] * frequencies)  # L d/2
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * phases[:, None])
    assert_close(turned, expected.flatten(-2), rtol=0, atol=ANGLE_ERROR)
    assert torch.equal(turned[:, 0], x[:, 0])


def test_rotation_keeps_norms():
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    turned = rotate(x, rotary_phases((torch.arange(7) * 100)[:, None], (8,)))
    # The squares of a float32 cosine and sine add up to one within 2 * 6e-8.
    assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=2e-7, atol=0)


def test_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def product(at: float, to: float) -> float:
        a, b = (rotary_phases((torch.tensor([p]))[:, None], (16,)) for p in (at, to))
        return float((rotate(q, a) * rotate(k, b)).sum())

    assert product(3.0, 8.0) == pytest.approx(product(103.0, 108.0), abs=1e-4)
    assert product(3.0, 8.0) == pytest.approx(product(0.0, 5.0), abs=1e-5)
    assert product(3.0, 8.0) != pytest.approx(product(8.0, 3.0), abs=1e-2)
