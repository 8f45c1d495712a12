"""Text encoders trained by others: found, checked, loaded and frozen.

Weights come from safetensors only and no code from a model
repository is ever run. A prompt's features depend on the prompt alone: padding is masked, on the
right, and dropout is off.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn

from opensora.config import Config
from opensora.errors import UsageError, require
from opensora.text.identity import digest
from opensora.types import Condition

_LOADING_ERRORS = (OSError, ValueError, RuntimeError, ImportError, SafetensorError)


class PretrainedTextConfig(Config):
    """Where a frozen text encoder lies and how it is run."""

    path: str = Field(description="folder, or hub repository, with config.json and *.safetensors")
    tokenizer_path: str | None = Field(
        default=None, description="the tokenizer's folder or repository where it is not `path`"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="of weights and features"
    )


class PretrainedEncoder(nn.Module, ABC):
    """A frozen text encoder: `encode(prompts) -> Condition`. It stays in eval mode.

    Attributes:
        channels: D of the tokens.
        pooled_channels: P of the pooled vector, 0 where there is none.
    """

    trainable = False
    model_classes: ClassVar[Mapping[str, str]]
    """The `model_type` of a config.json -> the transformers class that encodes its text."""

    def __init__(self, config: PretrainedTextConfig, *, max_length: int):
        super().__init__()
        self.config = config
        self.max_length = max_length
        self.tokenizer = load_tokenizer(config.tokenizer_path or config.path)
        self.model = load_model(config.path, self.model_classes, dtype=getattr(torch, config.dtype))
        if len(self.tokenizer) > self.model.config.vocab_size:
            raise UsageError(
                f"the tokenizer of '{config.path}' has {len(self.tokenizer)} tokens, its model "
                f"knows {self.model.config.vocab_size}: they do not belong together"
            )
        self.channels: int = self.model.config.hidden_size
        self.pooled_channels = 0
        self._identity: str | None = None

    @abstractmethod
    def features(self, ids: Tensor, mask: Tensor) -> Condition:
        """Features of token ids, int64 (B, S); mask: int64 (B, S), 1 where a token is real."""

    def forward(self, prompts: Sequence[str | None]) -> Condition:
        """Encode prompts; tokens are in the config's dtype and need no gradient.

        None stands for no text and is encoded as the empty string, which a tokenizer turns into
        its end token: the null embedding of Open-Sora 2.0 and of diffusers' PixArt pipelines.
        Longer prompts are cut after `max_length` tokens, the end token kept.
        """
        device = next(self.model.parameters()).device
        batch = self.tokenizer(
            [prompt or "" for prompt in prompts],
            padding="max_length" if self.pads_to_max_length else "longest",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        # A surrounding autocast would make features depend on who asks for them.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return self.features(ids, mask)

    encode = forward

    @property
    def pads_to_max_length(self) -> bool:
        """Whether S is always `max_length`, rather than the longest prompt's length."""
        return False

    def train(self, mode: bool = True) -> PretrainedEncoder:
        """Stays in eval mode whatever `mode` says: a frozen encoder has no dropout."""
        return super().train(False)

    def identity(self) -> str:
        """A digest of everything that decides the features, kept after the first call."""
        if self._identity is None:
            config = self.config.model_dump(mode="json", exclude={"path", "tokenizer_path"})
            architecture = self.model.config.to_diff_dict()
            for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
                architecture.pop(name, None)
            parts = [config, architecture, _vocabulary(self.tokenizer)]
            self._identity = digest(json.dumps(parts, sort_keys=True, default=str), self.model)
        return self._identity


def load_model(path: str, model_classes: Mapping[str, str], *, dtype: torch.dtype) -> Any:
    """A frozen transformers model from a folder or a hub repository.

    Args:
        model_classes: `model_type` of config.json -> name of the transformers class.

    Raises:
        MissingPackageError: transformers is absent.
        UsageError: nothing loadable at `path`, another family of models, or weights missing.
    """
    transformers = require("transformers", extra="text", purpose=f"the text encoder '{path}'")
    source = _source(path)
    try:
        family = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
    except _LOADING_ERRORS as error:
        raise _unloadable(path, error) from error
    if family not in model_classes:
        raise UsageError(
            f"text encoder '{path}' is a '{family}' model; this kind of encoder takes "
            f"{', '.join(model_classes)}. Choose another path or another kind"
        )
    try:
        model, report = getattr(transformers, model_classes[family]).from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except _LOADING_ERRORS as error:
        raise _unloadable(path, error) from error
    absent = sorted(map(str, report["missing_keys"]))
    if absent:
        raise UsageError(
            f"text encoder '{path}' lacks {len(absent)} of its weights ('{absent[0]}' is one): "
            "its files are incomplete or of another model"
        )
    return model.requires_grad_(False).eval()


def load_tokenizer(path: str) -> Any:
    """A tokenizer that pads and cuts on the right.

    Raises:
        MissingPackageError: transformers is absent.
        UsageError: nothing loadable at `path`, no vocabulary, no padding token, or no token for
            an empty text.
    """
    transformers = require("transformers", extra="text", purpose=f"the tokenizer '{path}'")
    source = _source(path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except _LOADING_ERRORS as error:
        raise _unloadable(path, error) from error
    # Where a T5 folder has no tokenizer files, transformers makes one that knows no words.
    if len(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()) < 2:
        raise UsageError(
            f"tokenizer '{path}' has no vocabulary: tokenizer.json (or spiece.model) is missing"
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token_id is None:
        raise UsageError(f"tokenizer '{path}' has no padding token, so prompts cannot be batched")
    if not tokenizer("")["input_ids"]:
        raise UsageError(
            f"tokenizer '{path}' adds no end token, so an empty prompt would have no tokens"
        )
    return tokenizer


def _source(path: str) -> str:
    """`path` as transformers takes it; a path that cannot be a hub id must be a folder."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path:
        raise UsageError(
            f"text encoder '{path}' is not a folder: give a folder with config.json, "
            "*.safetensors and a tokenizer, or a hub repository such as google/t5-v1_1-xxl"
        )
    return path


def _unloadable(path: str, error: BaseException) -> UsageError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return UsageError(
        f"text encoder '{path}' cannot be loaded ({reason}): give a folder or a hub repository "
        "with config.json, *.safetensors and a tokenizer; pickled weights are not read"
    )


def _vocabulary(tokenizer: Any) -> object:
    """Everything that decides how text is split; slow tokenizers show their tokens only."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return fast.to_str() if fast is not None else tokenizer.get_vocab()
