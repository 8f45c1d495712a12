"""CLIP's text half: transformers' tokens, and the end token's state as the pooled vector."""

import pytest
import torch
from torch.testing import assert_close

from opensora.errors import UsageError
from opensora.text.clip import CLIPTextConfig, CLIPTextEncoder
from opensora.text.t5 import T5Config
from opensora.text.t5_clip import T5CLIPConfig, T5CLIPEncoder

PROMPTS = ["a red circle moves left", None, "a square"]

ROUNDING = 256 * torch.finfo(torch.float32).eps
"""Two layers of sums over at most 32 terms, of values up to 4, in another order."""


def config(folder, **changes):
    return CLIPTextConfig(path=str(folder), dtype="float32", max_length=12, **changes)


@pytest.fixture(scope="module")
def encoder(clip_folder):
    return CLIPTextEncoder(config(clip_folder))


def test_tokens_and_pooled_are_those_of_transformers(encoder, clip_folder):
    from transformers import CLIPTextModel

    model = CLIPTextModel.from_pretrained(clip_folder).eval()
    condition = encoder.encode(PROMPTS)
    for row, ids in enumerate([[3, 4, 5, 8, 11, 12, 1], [3, 1], [3, 4, 9, 1]]):
        expected = model(torch.tensor([ids]))
        length = int(condition.mask[row].sum())
        assert length == len(ids)
        state = expected.last_hidden_state[0]
        assert_close(condition.tokens[row, :length], state, rtol=0, atol=ROUNDING)
        assert_close(condition.pooled[row], expected.pooler_output[0], rtol=0, atol=ROUNDING)
        assert_close(condition.pooled[row], state[-1], rtol=0, atol=ROUNDING)
    assert (encoder.channels, encoder.pooled_channels) == (16, 16)


def test_padding_with_the_end_token_is_masked_and_changes_nothing(encoder):
    batch = encoder.encode(PROMPTS)
    assert batch.mask.sum(1).tolist() == [7, 2, 4]
    assert not batch.tokens[~batch.mask].any()
    for row, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        length = alone.tokens.shape[1]
        assert_close(batch.tokens[row, :length], alone.tokens[0], rtol=0, atol=ROUNDING)
        assert_close(batch.pooled[row], alone.pooled[0], rtol=0, atol=ROUNDING)


def test_a_whole_clip_model_gives_its_text_half(write, tmp_path, clip_folder):
    import transformers

    text = transformers.CLIPTextConfig.from_pretrained(clip_folder)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    )
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
        )
    ).eval()
    whole.save_pretrained(tmp_path)
    write.tokenizer(tmp_path, template="<s> $A </s>", pad_token="</s>")
    pooled = CLIPTextEncoder(config(tmp_path)).encode(["a square"]).pooled
    expected = whole.text_model(torch.tensor([[3, 4, 9, 1]])).pooler_output
    assert_close(pooled, expected, rtol=0, atol=ROUNDING)


def test_more_tokens_than_positions_are_refused(clip_folder):
    with pytest.raises(UsageError, match="max_length 13 exceeds the 12 positions"):
        CLIPTextEncoder(CLIPTextConfig(path=str(clip_folder), max_length=13))


def test_together_t5_gives_the_tokens_and_clip_the_pooled_vector(t5_folder, clip_folder, encoder):
    both = T5CLIPEncoder(
        T5CLIPConfig(t5=T5Config(path=str(t5_folder), dtype="float32"), clip=config(clip_folder))
    )
    condition = both.encode(PROMPTS)
    assert torch.equal(condition.tokens, both.t5.encode(PROMPTS).tokens)
    assert condition.mask.sum(1).tolist() == [6, 1, 3]
    assert torch.equal(condition.pooled, encoder.encode(PROMPTS).pooled)
    assert both.identity() != both.t5.identity()
    assert both.clip.identity() == encoder.identity()
