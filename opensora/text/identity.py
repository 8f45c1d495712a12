"""Which encoder made these features: one digest of its config and weights.

Caches of features are keyed by it, so that features of other weights are never mistaken for one's
own. Paths are left out: the same weights in another folder are the same encoder.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def digest(description: str, module: nn.Module) -> str:
    """BLAKE2b-128, in hexadecimal, of a description and of every entry of the state dict.

    Reads all weights once: about a second a gigabyte.

    Args:
        description: what beside the weights decides the features (config, vocabulary).
    """
    state = hashlib.blake2b(description.encode(), digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        state.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        state.update(values.view(torch.uint8).numpy().data)
    return state.hexdigest()
