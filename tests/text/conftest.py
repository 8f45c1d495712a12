"""Tiny text encoders with random weights, saved as their public counterparts are."""

from types import SimpleNamespace

import pytest
import torch

WORDS = ["a", "red", "blue", "green", "circle", "square", "triangle", "moves", "left", "up"]


def write_tokenizer(folder, *, template="$A </s>", pad_token="<pad>"):
    """A word-level tokenizer whose end token is added by `template` ('' adds none)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "<s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        special = [("<s>", 3), ("</s>", 1)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[token for token in special if token[0] in template]
        )
    names = {"pad_token": pad_token} if pad_token else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", **names
    ).save_pretrained(folder)


def write_t5(folder, *, family="T5"):
    """A two-layer T5 encoder and its tokenizer."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4
    )
    getattr(transformers, f"{family}EncoderModel")(config).save_pretrained(folder)
    write_tokenizer(folder)


def write_clip(folder):
    """A two-layer CLIP text encoder and its tokenizer, which pads with the end token as CLIP's."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=12,
        pad_token_id=1,
        bos_token_id=3,
        eos_token_id=1,
    )
    CLIPTextModel(config).save_pretrained(folder)
    write_tokenizer(folder, template="<s> $A </s>", pad_token="</s>")


@pytest.fixture(scope="session")
def write():
    """The writers of tiny models by name: `write.tokenizer(folder, ...)`, `write.t5(folder)`."""
    pytest.importorskip("transformers", reason="needs the extra opensora[text]")
    return SimpleNamespace(tokenizer=write_tokenizer, t5=write_t5)


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    pytest.importorskip("transformers", reason="needs the extra opensora[text]")
    folder = tmp_path_factory.mktemp("t5")
    write_t5(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    pytest.importorskip("transformers", reason="needs the extra opensora[text]")
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder
