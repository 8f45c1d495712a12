"""T5's tokens with CLIP's pooled vector: what FLUX-like transformers (MMDiT) are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import nn

from opensora.config import Config
from opensora.text.clip import CLIPTextConfig, CLIPTextEncoder
from opensora.text.t5 import T5Config, T5Encoder
from opensora.types import Condition


class T5CLIPConfig(Config):
    """Both encoders' configs."""

    kind: Literal["t5+clip"] = "t5+clip"
    t5: T5Config
    clip: CLIPTextConfig


class T5CLIPEncoder(nn.Module):
    """Prompts -> Condition with T5's tokens (B, S, D) and CLIP's pooled (B, P)."""

    trainable = False

    def __init__(self, config: T5CLIPConfig):
        super().__init__()
        self.config = config
        self.t5 = T5Encoder(config.t5)
        self.clip = CLIPTextEncoder(config.clip)
        self.channels = self.t5.channels
        self.pooled_channels = self.clip.pooled_channels

    def forward(self, prompts: Sequence[str | None]) -> Condition:
        """Encode prompts; None or an empty string stands for no text."""
        return replace(self.t5.encode(prompts), pooled=self.clip.encode(prompts).pooled)

    encode = forward

    def identity(self) -> str:
        """Both encoders' identities."""
        return f"{self.t5.identity()}{self.clip.identity()}"
