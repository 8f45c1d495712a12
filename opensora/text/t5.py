"""T5 and its relatives as frozen text encoders (Raffel et al. 2019): tokens, nothing pooled."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from opensora.text.pretrained import PretrainedEncoder, PretrainedTextConfig
from opensora.types import Condition


class T5Config(PretrainedTextConfig):
    """A T5, mT5 or UMT5 encoder. Open-Sora 1.x uses T5 v1.1 XXL with 300 tokens, 2.0 with 512."""

    kind: Literal["t5"] = "t5"
    max_length: int = Field(default=300, ge=1, description="tokens; longer prompts are cut")
    attend_padding: bool = Field(
        default=False,
        description="pad every prompt to max_length and let padding be seen, by T5 and by the "
        "denoiser, as FLUX and Open-Sora 2.0 were trained",
    )


class T5Encoder(PretrainedEncoder):
    """Prompts -> Condition with tokens (B, S, D), S the longest prompt's number of tokens."""

    model_classes: ClassVar = {
        "t5": "T5EncoderModel",
        "mt5": "MT5EncoderModel",
        "umt5": "UMT5EncoderModel",
    }

    def __init__(self, config: T5Config):
        super().__init__(config, max_length=config.max_length)
        self.attend_padding = config.attend_padding

    @property
    def pads_to_max_length(self) -> bool:
        return self.attend_padding

    def features(self, ids: Tensor, mask: Tensor) -> Condition:
        if self.attend_padding:
            mask = mask.new_ones(mask.shape)
        tokens = self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # B S D
        mask = mask.bool()
        return Condition(tokens=tokens * mask[..., None], mask=mask)
