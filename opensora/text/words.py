"""A small text encoder that needs no download: hashed words, a short transformer, a mean.

It trains together with the denoiser. Any language works, because a word is its hash; two
independent hashes a word make full collisions rare (hash embeddings, Svenstrup et al. 2017).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from opensora.config import Config
from opensora.ops.attention import attend
from opensora.ops.layers import Mlp
from opensora.text.identity import digest
from opensora.types import Condition

_WORD = re.compile(r"\w+|[^\w\s]")


class WordsConfig(Config):
    """Architecture of `WordsEncoder`."""

    kind: Literal["words"] = "words"
    channels: int = Field(default=128, ge=8, description="D of tokens and of the pooled vector")
    depth: int = Field(default=1, ge=0, description="transformer layers over the words")
    num_heads: int = Field(default=4, ge=1)
    buckets: int = Field(default=4096, ge=16, description="rows of each of the two hash tables")
    max_words: int = Field(default=64, ge=1, description="longer prompts are cut")

    @model_validator(mode="after")
    def _divides(self) -> WordsConfig:
        if self.channels % self.num_heads:
            raise ValueError(f"channels {self.channels} needs to be a multiple of num_heads")
        return self


@lru_cache(maxsize=65536)
def word_hashes(word: str) -> tuple[int, int]:
    """Two independent 32-bit hashes of a word, the same on every machine."""
    code = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(code[:4], "little"), int.from_bytes(code[4:], "little")


def split_words(prompt: str) -> list[str]:
    """Lower-case words and punctuation marks, in normal form KC."""
    return _WORD.findall(unicodedata.normalize("NFKC", prompt).lower())


class WordLayer(nn.Module):
    """Pre-norm self-attention and MLP over the words of a prompt: (B, S, D) -> (B, S, D)."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, 4 * channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        x = x + self.proj(attend(q, k, v, mask=mask).flatten(2))
        return x + self.mlp(self.norm2(x))


class WordsEncoder(nn.Module):
    """Prompts -> Condition with tokens (B, S, D) and a pooled (B, D); S is the longest prompt's.

    A dropped or empty prompt is one learned null token.
    """

    trainable = True

    def __init__(self, config: WordsConfig):
        super().__init__()
        self.config = config
        self.channels = self.pooled_channels = config.channels
        self.tables = nn.ModuleList(nn.Embedding(config.buckets, config.channels) for _ in range(2))
        self.positions = nn.Embedding(config.max_words, config.channels)
        self.null = nn.Parameter(torch.randn(config.channels))
        self.layers = nn.ModuleList(
            WordLayer(config.channels, config.num_heads) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.channels)
        nn.init.normal_(self.positions.weight, std=0.3)

    def forward(self, prompts: Sequence[str | None]) -> Condition:
        """Encode prompts; None or an empty string stands for no text."""
        device = self.null.device
        words = [split_words(p or "")[: self.config.max_words] for p in prompts]
        lengths = torch.tensor([len(w) for w in words], dtype=torch.long)
        length = max([1, *(len(w) for w in words)])
        indices = torch.zeros(len(words), length, 2, dtype=torch.long)
        for row, sentence in enumerate(words):
            if sentence:
                indices[row, : len(sentence)] = torch.tensor([word_hashes(w) for w in sentence])
        indices = (indices % self.config.buckets).to(device)  # B S 2
        mask = (torch.arange(length) < lengths.clamp(min=1)[:, None]).to(device)  # B S
        absent = (lengths == 0).to(device)
        x = self.tables[0](indices[..., 0]) + self.tables[1](indices[..., 1])  # B S D
        x = torch.where(absent[:, None, None], self.null.expand_as(x), x)
        x = x + self.positions.weight[:length]
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x) * mask[..., None]
        pooled = x.sum(dim=1) / mask.sum(dim=1, keepdim=True)  # B D
        return Condition(tokens=x, mask=mask, pooled=pooled)

    encode = forward

    def identity(self) -> str:
        """A digest of the config and of the weights as they are now."""
        return digest(self.config.model_dump_json(), self)
