"""Frechet distance and MMD against known answers and formulas written by others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opensora.errors import DataError, UsageError
from opensora.evaluate.frechet import (
    FrechetStats,
    Reference,
    frechet_distance,
    jackknife,
    mmd,
    mmd_values,
)
from opensora.runtime import generator


def normal(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=generator(seed, "features"), dtype=torch.float64)


def with_moments(x: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """The sample moved to exactly this mean and, biased, this diagonal covariance."""
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    white = x @ (vectors / values.sqrt()) @ vectors.T
    return white * deviation + mean


def test_equal_sets_are_at_zero():
    x = normal(50, 8)
    stats = FrechetStats.of(x)
    assert frechet_distance(stats, stats) == pytest.approx(0, abs=1e-9)
    same = FrechetStats.of(torch.ones(10, 8))
    assert frechet_distance(same, same) == 0


def test_gaussians_that_commute_are_at_the_distance_of_the_closed_form():
    """|m|^2 + sum (s1 - s2)^2 where both covariances are diagonal."""
    mean = torch.arange(6).double()
    first, second = torch.tensor([1.0, 2, 3, 1, 2, 3]).double(), torch.full((6,), 2.0).double()
    a = with_moments(normal(300, 6), torch.zeros(6).double(), first)
    b = with_moments(normal(200, 6, seed=1), mean, second)
    found = frechet_distance(FrechetStats.of(a), FrechetStats.of(b))
    assert found == pytest.approx(55 + 4, rel=1e-9)


def test_the_distance_is_scipys_of_the_matrix_square_root():
    """Figures of scipy.linalg.sqrtm on numpy.cov with ddof 0 and 1, scipy 1.x, the same numbers."""
    chance = np.random.default_rng(1)
    a, b = chance.standard_normal((6, 6)), chance.standard_normal((6, 6))
    x = chance.standard_normal((40, 6)) @ a
    y = chance.standard_normal((50, 6)) @ b + 0.5
    first, second = (FrechetStats.of(torch.from_numpy(v)) for v in (x, y))
    assert frechet_distance(first, second) == pytest.approx(23.955868861367264, rel=1e-9)
    unbiased = frechet_distance(first, second, biased=False)
    assert unbiased == pytest.approx(24.462467654671645, rel=1e-9)


def test_a_part_is_taken_away_from_the_whole():
    x = normal(31, 5) + 3
    rest = FrechetStats.of(x) - FrechetStats.of(x[:7])
    assert rest.count == 24
    torch.testing.assert_close(rest.covariance(biased=False), torch.cov(x[7:].T))


def test_the_distance_of_equal_distributions_falls_as_one_over_n_and_the_mmd_stays_at_zero():
    """400 features with a decaying spectrum, trace 544: about 176, 91 and 46 at 256, 512, 1024."""
    decay = 1 / torch.arange(1, 401).double()
    deviation = (544 * decay / decay.sum()).sqrt()
    for count, expected in ((256, 176), (512, 91), (1024, 46)):
        pair = [normal(count, 400, seed) * deviation for seed in (count, count + 1)]
        distance = frechet_distance(*(FrechetStats.of(x) for x in pair))
        assert distance == pytest.approx(expected, rel=0.05)
        assert abs(mmd(*pair)) < 0.6  # the biased estimate of the same is 4 to 20 times as large


def test_the_mmd_is_its_definition_in_loops():
    x, y = normal(5, 3), normal(4, 3, seed=1) + 0.5

    def kernel(p, q):
        return float((p @ q / 3) ** 2)

    within = sum(kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    within += sum(kernel(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
    across = sum(kernel(p, q) for p in x for q in y) / 20
    assert mmd(x, y) == pytest.approx(100 * (within - 2 * across), rel=1e-9)


def test_the_values_of_samples_are_jackknife_pseudo_values():
    x, y = normal(6, 3), normal(5, 3, seed=1)
    values = mmd_values(x, y)
    without = [mmd(x, torch.cat([y[:k], y[k + 1 :]])) for k in range(5)]
    for value, left_out in zip(values.tolist(), without, strict=True):
        assert value == pytest.approx(5 * mmd(x, y) - 4 * left_out, rel=1e-6, abs=1e-9)


def test_the_interval_surrounds_the_distance_and_narrows_with_n():
    reference = FrechetStats.of(normal(500, 6))
    widths = []
    for count in (60, 960):
        distance, low, high = jackknife(reference, normal(count, 6, seed=2) + 1)
        assert low < distance < high
        widths.append(high - low)
    assert widths[1] < 0.6 * widths[0]


def test_too_few_videos_or_other_features_are_refused():
    one, two = FrechetStats.of(normal(1, 4)), FrechetStats.of(normal(9, 4))
    with pytest.raises(UsageError, match="1 and 9 videos have no covariance"):
        frechet_distance(one, two)
    with pytest.raises(UsageError, match="4 features against 5"):
        frechet_distance(two, FrechetStats.of(normal(9, 5)))
    with pytest.raises(UsageError, match="too few for an MMD"):
        mmd(normal(5, 3), normal(2, 3))


def test_a_reference_comes_back_and_one_of_other_settings_names_what_differs(tmp_path):
    path, settings = tmp_path / "deep" / "real.safetensors", {"frames": 16, "fps": 8.0}
    features = normal(7, 4).float()
    Reference(features, settings).save(path)
    torch.testing.assert_close(Reference.load(path, settings).features, features)
    with pytest.raises(UsageError, match=r"frames is 16, 17 is needed; seed is None, 1 is needed"):
        Reference.load(path, {"frames": 17, "fps": 8.0, "seed": 1})
    safe = path.read_bytes()
    path.write_bytes(safe.replace(b'"frames', b'"framez').replace(b'\\"frames', b'\\"framez'))
    with pytest.raises(DataError, match="remove it"):
        Reference.load(path, settings)
    content = bytearray(safe)
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        Reference.load(path, settings)
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        Reference.load(path, settings)
