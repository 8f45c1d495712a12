"""T5: transformers' own features, whatever a prompt is batched with."""

import pytest
import torch
from torch.testing import assert_close

from opensora.text.t5 import T5Config, T5Encoder

PROMPTS = ["a red circle moves left", None, "a square", "", "a blue triangle moves up up up"]

ROUNDING = 64 * torch.finfo(torch.float32).eps
"""Two layers of sums over at most 32 terms, in another order for another padding."""


@pytest.fixture(scope="module")
def encoder(t5_folder):
    return T5Encoder(T5Config(path=str(t5_folder), dtype="float32"))


def test_tokens_are_those_of_transformers(encoder, t5_folder):
    from transformers import AutoTokenizer, T5EncoderModel

    model = T5EncoderModel.from_pretrained(t5_folder).eval()
    condition = encoder.encode(PROMPTS)
    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tokenizer(prompt or "")["input_ids"]])
        expected = model(ids).last_hidden_state[0]
        assert condition.mask[row].sum() == len(expected)
        assert_close(condition.tokens[row, : len(expected)], expected, rtol=0, atol=ROUNDING * 4)


def test_masks_are_on_the_right_and_padding_is_zero(encoder):
    condition = encoder.encode(PROMPTS)
    assert condition.tokens.shape == (5, 8, 16)
    assert condition.mask.dtype == torch.bool
    assert condition.mask.sum(1).tolist() == [6, 1, 3, 1, 8]
    assert (condition.mask.int().diff(dim=1) <= 0).all()
    assert not condition.tokens[~condition.mask].any()
    assert condition.pooled is None
    assert (encoder.channels, encoder.pooled_channels) == (16, 0)


def test_a_prompt_alone_equals_the_prompt_in_a_batch(encoder):
    batch = encoder.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        length = alone.tokens.shape[1]
        assert_close(batch.tokens[row, :length], alone.tokens[0], rtol=0, atol=ROUNDING * 4)


def test_no_text_is_the_empty_string_and_differs_from_text(encoder):
    null = encoder.encode([None, "", "a"])
    assert torch.equal(null.tokens[0], null.tokens[1])
    assert not torch.equal(null.tokens[0], null.tokens[2])


def test_long_prompts_are_cut_and_keep_their_end_token(t5_folder):
    encoder = T5Encoder(T5Config(path=str(t5_folder), dtype="float32", max_length=4))
    long, short = encoder.encode(["a red circle moves left"]), encoder.encode(["a red circle"])
    assert torch.equal(long.tokens, short.tokens)


def test_attended_padding_is_part_of_the_features(t5_folder):
    config = T5Config(path=str(t5_folder), dtype="float32", max_length=8, attend_padding=True)
    padded = T5Encoder(config)
    condition = padded.encode(["a square"])
    assert condition.tokens.shape == (1, 8, 16)
    assert condition.mask.all()
    ids = torch.tensor([[4, 9, 1, 0, 0, 0, 0, 0]])
    expected = padded.model(input_ids=ids, attention_mask=None).last_hidden_state
    assert_close(condition.tokens, expected, rtol=0, atol=ROUNDING * 4)
    masked = T5Encoder(config.model_copy(update={"attend_padding": False})).encode(["a square"])
    assert not torch.allclose(condition.tokens[:, :3], masked.tokens, atol=1e-3)


def test_it_stays_frozen_in_eval_mode(encoder):
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.encode(["a"]).tokens.requires_grad
    assert torch.equal(encoder.encode(["a red"]).tokens, encoder.encode(["a red"]).tokens)


def test_a_surrounding_autocast_changes_nothing(encoder):
    with torch.autocast("cpu", torch.bfloat16):
        inside = encoder.encode(["a red circle"])
    assert torch.equal(inside.tokens, encoder.encode(["a red circle"]).tokens)


def test_features_may_enter_a_graph_that_trains(encoder):
    head = torch.nn.Linear(16, 1)
    head(encoder.encode(["a red circle"]).tokens).sum().backward()
    assert head.weight.grad.any()


def test_the_config_says_the_dtype(t5_folder):
    encoder = T5Encoder(T5Config(path=str(t5_folder), dtype="bfloat16"))
    assert encoder.encode(["a"]).tokens.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["UMT5", "MT5"])
def test_relatives_of_t5_load_too(write, tmp_path, family):
    write.t5(tmp_path, family=family)
    encoder = T5Encoder(T5Config(path=str(tmp_path), dtype="float32"))
    assert type(encoder.model).__name__ == f"{family}EncoderModel"
    assert encoder.encode(PROMPTS).tokens.isfinite().all()
