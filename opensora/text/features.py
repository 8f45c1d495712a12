"""Repeated prompts are encoded once: a frozen encoder with its most recent features in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from opensora.errors import UsageError
from opensora.text.encoders import TextEncoder
from opensora.types import Condition, concatenate


class CachedEncoder(nn.Module):
    """A frozen text encoder that remembers, with the encoder's own surface.

    Features lie on the CPU, without padding; the least recently used leave first. Each new prompt
    is encoded alone, so that what is remembered never depends on the prompts that came with it.
    Not for use by several threads at once.

    Args:
        encoder: a module that is not trainable.
        max_bytes: bound on the features kept.

    Raises:
        UsageError: the encoder trains, hence its features age.
    """

    trainable = False

    def __init__(self, encoder: TextEncoder, *, max_bytes: int = 1 << 30):
        super().__init__()
        if encoder.trainable:
            raise UsageError(
                f"features of {type(encoder).__name__} cannot be cached: it trains with the "
                "denoiser, so they change every step"
            )
        self.encoder = encoder
        self.max_bytes = max_bytes
        self.channels = encoder.channels
        self.pooled_channels = encoder.pooled_channels
        self.num_bytes = 0
        self._features: OrderedDict[str, Condition] = OrderedDict()

    def forward(self, prompts: Sequence[str | None]) -> Condition:
        """Encode prompts, those seen lately from memory; None is the empty string."""
        joined = concatenate([self._recall(prompt or "") for prompt in prompts])
        weight = next(self.parameters(), None)
        return joined if weight is None else joined.to(weight.device)

    encode = forward

    def identity(self) -> str:
        """The wrapped encoder's."""
        return self.encoder.identity()

    def _recall(self, prompt: str) -> Condition:
        if prompt in self._features:
            self._features.move_to_end(prompt)
            return self._features[prompt]
        features = self.encoder.encode([prompt]).to("cpu")
        self._features[prompt] = features
        self.num_bytes += _num_bytes(features)
        while self.num_bytes > self.max_bytes and self._features:
            _, oldest = self._features.popitem(last=False)
            self.num_bytes -= _num_bytes(oldest)
        return features


def _num_bytes(condition: Condition) -> int:
    tensors = (condition.tokens, condition.mask, condition.pooled)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
