"""How the page names things: metrics, folders, counts."""

from __future__ import annotations

from pathlib import Path

LABELS = {
    "loss": "Loss",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "l1": "L1 error",
    "kl": "KL divergence",
    "gradient_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "matmul_share": "Share of the machine's matmul rate",
    "peak_memory_bytes": "Peak memory",
    "lr_factor": "Learning rate factor",
    "cpu": "CPU",
    "opensora": "opensora",
    "torch": "PyTorch",
}


def title(name: str) -> str:
    """A metric's or fact's key as a heading: 'gradient_norm' -> 'Gradient norm'."""
    return LABELS.get(name) or plain(name)[:1].upper() + plain(name)[1:]


def plain(name: str) -> str:
    """A key as words: 'newton_residual' -> 'newton residual'."""
    return name.replace("_", " ").strip()


def plural(count: int, noun: str) -> str:
    """'1 video', '1,024 videos'."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def relative(path: Path, root: Path) -> str:
    """A folder as the reader knows it, from the reported folder on."""
    inside = path.relative_to(root).as_posix()
    return root.name if inside == "." else inside
