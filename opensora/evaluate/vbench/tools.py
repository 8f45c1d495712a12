"""The networks of one run, each loaded when a dimension first asks for it."""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from opensora.evaluate.vbench import measures, weights
from opensora.evaluate.vbench.extractors import Clip, Dino
from opensora.evaluate.vbench.raft import RAFT
from opensora.evaluate.vbench.weights import Shelf, Weights


class Tools:
    """What dimensions measure with, on one device."""

    def __init__(self, shelf: Shelf, device: torch.device):
        self.shelf, self.device = shelf, device
        # Styles repeat over prompts and their samples, of which there are 90 kinds at most.
        self.style_words = lru_cache(maxsize=128)(lambda words: self.clip_b.text(words))

    @cached_property
    def dino(self) -> Dino:
        return Dino(self._source(weights.DINO), self.device)

    @cached_property
    def clip_b(self) -> Clip:
        return Clip(self._source(weights.CLIP_B), self.device)

    @cached_property
    def clip_l(self) -> Clip:
        return Clip(self._source(weights.CLIP_L), self.device)

    @cached_property
    def aesthetic_head(self) -> tuple[Tensor, Tensor]:
        """Weight (1, D) and bias (1,) of LAION's linear head."""
        path, what = self._source(weights.AESTHETIC), "LAION's linear head on CLIP L/14"
        head = nn.Linear(self.clip_l.model.config.projection_dim, 1)
        weights.fill(head, weights.read_state(path, what), path, what)
        return head.weight, head.bias

    @cached_property
    def raft(self) -> RAFT:
        path, what = self._source(weights.RAFT_THINGS), "the authors' large RAFT"
        network = RAFT()
        weights.fill(network, weights.read_state(path, what), path, what)
        return network.to(self.device)

    def magnitudes(self, frames: np.ndarray, *, share: float, both_ends: bool) -> list[float]:
        """`measures.top_magnitude` of each pair of neighbours.

        Args:
            frames: uint8 (F, H, W, 3).
            both_ends: also of first to last and last to first.
        """
        pictures = torch.from_numpy(frames).permute(0, 3, 1, 2)
        pairs = [(i, i + 1) for i in range(len(frames) - 1)]
        if both_ends:
            pairs += [(0, len(frames) - 1), (len(frames) - 1, 0)]
        found = []
        for a, b in pairs:
            first, second = (pictures[i : i + 1].float().to(self.device) for i in (a, b))
            flow = self.raft(first, second, updates=measures.RAFT_UPDATES)[0]
            found.append(measures.top_magnitude(flow, share))
        return found

    def _source(self, wanted: Weights) -> str:
        source = self.shelf.find(wanted)
        assert source is not None, "a dimension runs only where its weights are"
        return source
