"""How far two videos are apart, frame by frame: PSNR, SSIM, and flicker that was added.

Plain functions on pixels, float64 inside. Nothing is resized and nothing learned.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03
_CEILING = 1e-10
"""Mean squared error (of values in [0, 1]) that stands for none: 100 dB."""


def unit(frames: Tensor) -> Tensor:
    """uint8 (F, H, W, 3) -> float64 (F, 3, H, W) in [0, 1]."""
    return frames.permute(0, 3, 1, 2).double() / 255


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, at most 100, of each frame: float64 (F,).

    Args:
        first, second: float (F, 3, H, W) in [0, 1].
    """
    error = (first - second).square().flatten(1).mean(1)
    return -10 * error.clamp(min=_CEILING).log10()


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity of each frame, averaged over the channels: float64 (F,), at most 1.

    Wang, Bovik, Sheikh, Simoncelli 2004, "Image Quality Assessment", equation 13 with a Gaussian
    window of 11 x 11 and sigma 1.5, K1 = 0.01, K2 = 0.03, a dynamic range of 1, moments with
    weights that sum to one, over the positions where the window lies inside the picture. It equals
    scikit-image's `structural_similarity(gaussian_weights=True, use_sample_covariance=False,
    data_range=1)`, which was compared with it.

    Args:
        first, second: float (F, 3, H, W) in [0, 1], each side 11 or more.

    Raises:
        ValueError: the pictures are smaller than the window.
    """
    frames, channels, height, width = first.shape
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs sides of {SSIM_WINDOW} or more, found {height}x{width}")
    pictures = [x.double().reshape(frames * channels, 1, height, width) for x in (first, second)]
    x, y = pictures
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = _K1**2, _K2**2
    index = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    index = index / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return index.reshape(frames, -1).mean(1)


def flicker_added(restored: Tensor, original: Tensor) -> float:
    """Mean absolute error of the differences between neighbouring frames, in grey levels of 255.

    Zero for any constant error: it sees only what changes from frame to frame and should not, or
    does not and should.

    Args:
        restored, original: float (F, 3, H, W) in [0, 1]; nan for a single frame.
    """
    error = restored.double() - original.double()
    return float(255 * error.diff(dim=0).abs().mean())


def _blur(pictures: Tensor) -> Tensor:
    """Gaussian means (N, 1, H - 10, W - 10) of (N, 1, H, W)."""
    offsets = torch.arange(SSIM_WINDOW, dtype=pictures.dtype, device=pictures.device)
    offsets = offsets - (SSIM_WINDOW - 1) / 2
    weights = (-offsets.square() / (2 * SSIM_SIGMA**2)).exp()
    weights = weights / weights.sum()
    return conv2d(conv2d(pictures, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
