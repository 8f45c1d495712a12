"""Options of `opensora sample` that make it faster or smaller, as trees of configs."""

from __future__ import annotations

from typing import Any

from opensora.errors import UsageError

TILES = {"auto": "auto", "always": True, "never": False}


def cache_tree(kind: str, threshold: float | None) -> dict[str, Any] | None:
    """The tree of `SamplingConfig.cache`, which is checked there.

    Raises:
        UsageError: a threshold for what has none.
    """
    if threshold is not None and kind not in ("teacache", "first_block"):
        raise UsageError(
            f"--cache-threshold is of teacache and first_block, but --cache is {kind}: leave it "
            "out, or choose one of them"
        )
    if kind == "off":
        return None
    return {"kind": kind} | ({} if threshold is None else {"threshold": threshold})


def savings_tree(
    offload: bool, quantize: str, tile_vae: str, decode_chunk: int | None
) -> dict[str, Any]:
    """The tree of `SavingsConfig`, which is checked there.

    Raises:
        UsageError: another word for tiles than those of TILES.
    """
    if tile_vae not in TILES:
        raise UsageError(f"--tile-vae {tile_vae} is unknown: say {', '.join(TILES)}")
    decode = {"tile": TILES[tile_vae], "chunk": decode_chunk}
    return {"offload": offload, "quantize": quantize, "decode": decode}
