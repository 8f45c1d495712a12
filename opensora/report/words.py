"""How the page names things: metrics, folders, counts."""

from __future__ import annotations

from pathlib import Path

TERMS = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "l1": "L1 error",
    "vae": "VAE",
    "mse": "MSE",
    "mmd": "MMD",
    "fvd": "FVD",
    "rfvd": "rFVD",
    "vbench": "VBench",
    "spatial_iou": "spatial IoU",
    "spatiotemporal_iou": "spatiotemporal IoU",
    "weighted_spatial_iou": "weighted spatial IoU",
}
"""Keys whose words are more than the key without its underscores."""

TITLES = {
    "kl": "KL divergence",
    "rfvd": "rFVD",
    "lr_factor": "Learning rate factor",
    "matmul_share": "Share of the machine's matmul rate",
    "opensora": "opensora",
    "peak_memory_bytes": "Peak memory",
    "torch": "PyTorch",
}
"""Keys whose heading is another one than their words."""


def title(name: str) -> str:
    """A metric's or fact's key as a heading: 'gradient_norm' -> 'Gradient norm'."""
    return TITLES.get(name) or plain(name)[:1].upper() + plain(name)[1:]


def plain(name: str) -> str:
    """A key as words: 'newton_residual' -> 'newton residual', 'psnr' -> 'PSNR'."""
    return TERMS.get(name) or name.replace("_", " ").strip()


def plural(count: int, noun: str) -> str:
    """'1 video', '1,024 videos'."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def relative(path: Path, root: Path) -> str:
    """A folder as the reader knows it, from the reported folder on."""
    inside = path.relative_to(root).as_posix()
    return root.name if inside == "." else inside
