"""The text encoders in one table: `kind` -> config -> encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol

from pydantic import Field

from opensora.text.clip import CLIPTextConfig, CLIPTextEncoder
from opensora.text.t5 import T5Config, T5Encoder
from opensora.text.t5_clip import T5CLIPConfig, T5CLIPEncoder
from opensora.text.words import WordsConfig, WordsEncoder
from opensora.types import Condition

TextConfig = Annotated[
    WordsConfig | T5Config | CLIPTextConfig | T5CLIPConfig, Field(discriminator="kind")
]

AnyTextEncoder = WordsEncoder | T5Encoder | CLIPTextEncoder | T5CLIPEncoder


class TextEncoder(Protocol):
    """What every text encoder offers.

    Attributes:
        channels: D of the tokens.
        pooled_channels: P of the pooled vector, 0 where there is none.
        trainable: whether it learns with the denoiser; the features of others may be cached.
    """

    @property
    def channels(self) -> int: ...

    @property
    def pooled_channels(self) -> int: ...

    @property
    def trainable(self) -> bool: ...

    def encode(self, prompts: Sequence[str | None]) -> Condition:
        """Tokens (B, S, D), their mask, right-padded, and the pooled vectors where there are any.

        None or an empty string stands for no text. A row depends on its own prompt only.
        """
        ...

    def identity(self) -> str:
        """A digest of config and weights, the same on every machine; keys cached features."""
        ...


def build(config: WordsConfig | T5Config | CLIPTextConfig | T5CLIPConfig) -> AnyTextEncoder:
    """The encoder that a config describes; pretrained ones are loaded.

    Raises:
        UsageError: weights that cannot be loaded, or a package that is absent.
    """
    match config:
        case WordsConfig():
            return WordsEncoder(config)
        case T5Config():
            return T5Encoder(config)
        case CLIPTextConfig():
            return CLIPTextEncoder(config)
        case T5CLIPConfig():
            return T5CLIPEncoder(config)
