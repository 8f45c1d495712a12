"""Distances between two sets of feature vectors: Frechet's, and an unbiased MMD.

Statistics are sums in float64, so that those of a part can be taken away. The Frechet distance of
finite samples is biased upwards by about the number of features over N: two samples of one
distribution are not at zero, and figures compare at equal N only. The MMD beside it has no such
bias.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from opensora.disk import replace_file
from opensora.errors import DataError, UsageError


@dataclass(frozen=True)
class FrechetStats:
    """Count, sum and sum of outer products of N vectors of D features, float64 on the CPU."""

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FrechetStats:
        """Of features (N, D)."""
        x = features.double().cpu()
        return cls(len(x), x.sum(0), x.T @ x)

    def __sub__(self, part: FrechetStats) -> FrechetStats:
        """Of what remains without a part."""
        count = self.count - part.count
        return FrechetStats(count, self.total - part.total, self.outer - part.outer)

    @property
    def mean(self) -> Tensor:
        """(D,)."""
        return self.total / self.count

    def covariance(self, *, biased: bool = True) -> Tensor:
        """(D, D), divided by N as in StyleGAN-V and cd-fvd, or by N - 1 as `numpy.cov` does."""
        mean = self.mean
        centred = self.outer - self.count * torch.outer(mean, mean)
        return centred / (self.count if biased else self.count - 1)


def frechet_distance(first: FrechetStats, second: FrechetStats, *, biased: bool = True) -> float:
    """Squared Frechet distance of the Gaussians with these means and covariances.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson and Landau 1982; Heusel et al. 2017,
    equation 6). The eigenvalues of S1 S2 are those of the symmetric S1^(1/2) S2 S1^(1/2), whose
    square roots are summed: no matrix root with a complex residue, no jitter on the diagonal.

    Raises:
        UsageError: fewer than two vectors in a set, or another number of features.
    """
    if first.total.shape != second.total.shape:
        raise UsageError(f"{len(first.total)} features against {len(second.total)}")
    if min(first.count, second.count) < 2:
        raise UsageError(f"{first.count} and {second.count} videos have no covariance; give 2 each")
    a, b = first.covariance(biased=biased), second.covariance(biased=biased)
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    shift = (first.mean - second.mean).square().sum()
    return float(shift + a.trace() + b.trace() - 2 * cross)


def jackknife(
    reference: FrechetStats, features: Tensor, *, biased: bool = True, parts: int = 12
) -> tuple[float, float, float]:
    """Frechet distance of features (N, D) from a reference, with a 95 % interval.

    The interval is +- 1.96 standard errors of the grouped jackknife over parts of the features
    (Efron and Tibshirani 1993, chapter 11): how far other videos of the same model would move it,
    at this N. A bootstrap that repeats videos would raise the distance itself.

    Returns:
        distance, low, high.
    """
    whole = FrechetStats.of(features)
    distance = frechet_distance(reference, whole, biased=biased)
    parts = min(parts, len(features) // 2)
    if parts < 2:
        return distance, distance, distance
    left_out = torch.tensor(
        [
            frechet_distance(reference, whole - FrechetStats.of(features[k::parts]), biased=biased)
            for k in range(parts)
        ]
    ).double()
    error = ((parts - 1) * left_out.var(correction=0)).sqrt().item()
    return distance, distance - 1.96 * error, distance + 1.96 * error


def mmd(first: Tensor, second: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy x 100 of features (N, D) and (M, D).

    The U-statistic (Gretton et al. 2012, equation 3) with the polynomial kernel (x.y / D)^2, the
    one of JEDi (Luo et al. 2024), which takes the biased V-statistic and likewise reports x 100.
    Its mean is zero for equal distributions at every N, so it is negative about half the time.
    """
    return float(mmd_values(first, second).mean())


def mmd_values(first: Tensor, second: Tensor) -> Tensor:
    """What each of `second` (M, D) adds to `mmd`: float64 (M,), whose mean it is exactly.

    Jackknife pseudo-values M U - (M - 1) U_without_one: their spread over samples is, to first
    order, the sampling error of `mmd` with the reference fixed.

    Raises:
        UsageError: fewer than three videos.
    """
    n, m = len(first), len(second)
    if n < 2 or m < 3:
        raise UsageError(f"{n} and {m} videos are too few for an MMD; give 2 and 3")
    x, y = first.double().cpu(), second.double().cpu()
    within_x, within_y, across = (_kernel(p, q) for p, q in ((x, x), (y, y), (x, y)))
    fixed = (within_x.sum() - within_x.trace()) / (n * (n - 1))
    rows = within_y.sum(0) - within_y.diagonal()  # (M,)
    total = rows.sum() / 2
    pairs = m * (2 * total / (m * (m - 1))) - (m - 1) * (2 * (total - rows) / ((m - 1) * (m - 2)))
    return 100 * (fixed + pairs - 2 * across.mean(0))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1]).square()


@dataclass(frozen=True)
class Reference:
    """Features of real clips and the settings that they depend on.

    Attributes:
        features: float32 (N, D).
        settings: JSON; `key` is a digest of it.
    """

    features: Tensor
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: features, with settings and digests of both beside them."""
        features = self.features.float().contiguous().cpu()
        facts = {"settings": json.dumps(self.settings), "key": self.key, "sha256": _sha(features)}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, save({"features": features}, metadata=facts))

    @classmethod
    def load(cls, path: str | Path, settings: dict[str, Any]) -> Reference:
        """Read what `save` wrote.

        Args:
            settings: that it has to have.

        Raises:
            DataError: the file is damaged.
            UsageError: its settings differ, with the differing keys.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                found = cls(file.get_tensor("features"), json.loads(facts["settings"]))
                sound = (found.key, _sha(found.features)) == (facts["key"], facts["sha256"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise DataError(f"the reference {path} cannot be read ({error}): remove it") from None
        if not sound:
            raise DataError(f"the reference {path} is damaged: remove it")
        wanted = json.loads(json.dumps(settings))
        keys = sorted({*wanted, *found.settings})
        differing = [k for k in keys if wanted.get(k) != found.settings.get(k)]
        if differing:
            told = "; ".join(
                f"{k} is {found.settings.get(k)!r}, {wanted.get(k)!r} is needed" for k in differing
            )
            raise UsageError(f"the reference {path} was made otherwise: {told}; name another file")
        return found


def _sha(features: Tensor) -> str:
    return hashlib.sha256(features.numpy().tobytes()).hexdigest()
