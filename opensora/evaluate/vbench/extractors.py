"""DINO and CLIP through transformers: frames to features.

The one file of this room that imports transformers. Weights come from a folder or, when allowed,
from the hub; no code of a model repository is run. All arithmetic is float32, where OpenAI's own
loader uses half precision on GPUs: scores may differ from upstream's in the fourth decimal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from opensora.errors import CheckpointError, require
from opensora.evaluate.vbench import transforms

BATCH = 32
"""Frames at a time. Upstream's choice for aesthetic_quality; no score depends on it."""

Transform = Callable[[np.ndarray, int], Tensor]


class Dino:
    """DINO ViT-B/16 (Caron et al. 2021): the class token of each frame, not normalised.

    Positions of pictures that are not square are interpolated as facebookresearch/dino's
    vision_transformer.py does it, which transformers does slightly differently.
    """

    def __init__(self, source: str, device: torch.device):
        self.model = _load("ViTModel", "vit", source, layer_norm_eps=1e-6, add_pooling_layer=False)
        self.model.to(device)
        embeddings = self.model.embeddings
        embeddings.interpolate_pos_encoding = lambda _, height, width: dino_positions(
            embeddings.position_embeddings, height // self.patch, width // self.patch
        )
        self.device = device

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return self.model.config.patch_size

    @torch.no_grad()
    def __call__(self, frames: np.ndarray, transform: Transform = transforms.for_dino) -> Tensor:
        """float32 (F, D) on the CPU of uint8 (F, H, W, 3)."""
        found = []
        for part in _batches(frames):
            pixels = transform(part, self.model.config.image_size).to(self.device)
            output = self.model(pixel_values=pixels, interpolate_pos_encoding=True)
            found.append(output.last_hidden_state[:, 0].float().cpu())
        return torch.cat(found)


def dino_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """DINO's position embeddings for a grid of another form.

    Args:
        table: (1, 1 + n * n, D), the class token first.

    Returns:
        (1, 1 + rows * columns, D). The added 0.1 keeps the size from being rounded down; it also
        moves the sampling points, so it belongs to the result.
    """
    side = math.isqrt(table.shape[1] - 1)
    if rows == columns == side:
        return table
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = ((rows + 0.1) / side, (columns + 0.1) / side)
    grid = interpolate(grid, scale_factor=factors, mode="bicubic")
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class Clip:
    """CLIP (Radford et al. 2021): projected features of frames and words, not normalised."""

    def __init__(self, source: str, device: torch.device):
        self.source, self.device = source, device
        self.model = _load("CLIPModel", "clip", source)
        self.model.to(device)

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied with; 100 in OpenAI's weights."""
        return float(self.model.logit_scale.exp())

    @torch.no_grad()
    def __call__(self, frames: np.ndarray, transform: Transform = transforms.for_clip) -> Tensor:
        """float32 (F, D) on the CPU of uint8 (F, H, W, 3)."""
        side = self.model.config.vision_config.image_size
        found = []
        for part in _batches(frames):
            pooled = self.model.vision_model(pixel_values=transform(part, side).to(self.device))
            found.append(self.model.visual_projection(pooled.pooler_output).float().cpu())
        return torch.cat(found)

    @torch.no_grad()
    def text(self, words: str) -> Tensor:
        """float32 (D,) on the CPU."""
        transformers = _transformers()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.source)
        except (OSError, ValueError) as error:
            raise _unloadable(self.source, "the tokenizer", error) from error
        batch = tokenizer([words], return_tensors="pt", truncation=True)
        pooled = self.model.text_model(**batch.to(self.device)).pooler_output
        return self.model.text_projection(pooled)[0].float().cpu()


def _batches(frames: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(frames), BATCH):
        yield frames[start : start + BATCH]


def _transformers() -> Any:
    return require("transformers", extra="text", purpose="VBench's DINO and CLIP")


def _load(kind: str, family: str, source: str, **changes: Any) -> Any:
    """A frozen model of one family, complete.

    Raises:
        CheckpointError: nothing loadable, another family, or weights missing.
    """
    transformers = _transformers()
    extra = {k: changes.pop(k) for k in ("add_pooling_layer",) if k in changes}
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        found = config.model_type
        if found == family:
            for key, value in changes.items():
                setattr(config, key, value)
            model, report = getattr(transformers, kind).from_pretrained(
                source, config=config, dtype=torch.float32, output_loading_info=True, **extra
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise _unloadable(source, f"a {family} model", error) from error
    if found != family:
        raise CheckpointError(f"'{source}' holds a '{found}' model where '{family}' is needed")
    absent = sorted(map(str, report["missing_keys"]))
    if absent:
        raise CheckpointError(
            f"'{source}' lacks {len(absent)} weights of {kind} ('{absent[0]}' is one)"
        )
    return model.requires_grad_(False).eval()


def _unloadable(source: str, what: str, error: BaseException) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return CheckpointError(f"'{source}' cannot be loaded as {what} ({reason}): fetch it again")
