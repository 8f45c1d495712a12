"""CLIP's text half as a frozen encoder (Radford et al. 2021): tokens and one pooled vector."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from opensora.errors import UsageError
from opensora.text.pretrained import PretrainedEncoder, PretrainedTextConfig
from opensora.types import Condition


class CLIPTextConfig(PretrainedTextConfig):
    """The text encoder of a CLIP model, whole or alone; ViT-L/14's has 768 channels."""

    kind: Literal["clip"] = "clip"
    max_length: int = Field(default=77, ge=2, description="tokens; longer prompts are cut")


class CLIPTextEncoder(PretrainedEncoder):
    """Prompts -> Condition with tokens (B, S, D) and a pooled (B, D).

    The pooled vector is the normalised last state of the end token, before CLIP's projection, as
    FLUX and Open-Sora 2.0 feed it.
    """

    model_classes: ClassVar = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"}

    def __init__(self, config: CLIPTextConfig):
        super().__init__(config, max_length=config.max_length)
        positions = self.model.config.max_position_embeddings
        if config.max_length > positions:
            raise UsageError(
                f"max_length {config.max_length} exceeds the {positions} positions of the text "
                f"encoder '{config.path}': give {positions} or less"
            )
        self.pooled_channels = self.channels

    def features(self, ids: Tensor, mask: Tensor) -> Condition:
        out = self.model(input_ids=ids, attention_mask=mask)
        mask = mask.bool()
        tokens = out.last_hidden_state * mask[..., None]  # B S D
        return Condition(tokens=tokens, mask=mask, pooled=out.pooler_output)
