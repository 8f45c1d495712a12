"""The words encoder: a prompt's features depend on its words, their order, and nothing else."""

import pydantic
import pytest
import torch
from torch.testing import assert_close

from opensora.text.words import WordsConfig, WordsEncoder, split_words, word_hashes

ROUNDING = 256 * torch.finfo(torch.float32).eps
"""Sums of at most 64 terms of values up to 4, in another order for another padding."""


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return WordsEncoder(WordsConfig(channels=16, num_heads=2, depth=2, max_words=8)).eval()


def test_hashes_are_the_same_on_every_machine():
    assert word_hashes("circle") == (1663927229, 2162260251)
    assert len({word_hashes(str(i))[0] for i in range(1000)}) == 1000


def test_words_are_split_in_any_script():
    assert split_words("Two RED circles, fast.") == ["two", "red", "circles", ",", "fast", "."]
    assert split_words("ﬁve\u00a0круга") == ["five", "круга"]
    assert split_words(" \n\t") == []


def test_a_prompt_alone_equals_the_prompt_in_a_batch(encoder):
    prompts = ["a red circle moves left", "", "two squares", None]
    batch = encoder.encode(prompts)
    assert batch.mask.sum(1).tolist() == [5, 1, 2, 1]
    assert not batch.tokens[~batch.mask].any()
    for row, prompt in enumerate(prompts):
        alone = encoder.encode([prompt])
        length = alone.tokens.shape[1]
        assert_close(batch.tokens[row, :length], alone.tokens[0], rtol=0, atol=ROUNDING)
        assert_close(batch.pooled[row], alone.pooled[0], rtol=0, atol=ROUNDING)


def test_no_text_is_one_learned_token(encoder):
    encoder.zero_grad()
    null = encoder.encode([None, "", "  "])
    assert torch.equal(null.tokens[0], null.tokens[1])
    assert torch.equal(null.tokens[0], null.tokens[2])
    null.pooled.square().sum().backward()
    assert encoder.null.grad.any()
    assert not encoder.tables[0].weight.grad.any()


def test_order_and_case_of_words(encoder):
    one, swapped, loud = encoder.encode(["red left", "left red", "RED LEFT"]).pooled
    assert (one - swapped).abs().max() > 1e-2
    assert torch.equal(one, loud)


def test_long_prompts_are_cut(encoder):
    long = encoder.encode([" ".join(f"w{i}" for i in range(20))])
    short = encoder.encode([" ".join(f"w{i}" for i in range(8))])
    assert torch.equal(long.tokens, short.tokens)


def test_hostile_text_is_encoded(encoder):
    hostile = ["\ud800 lone surrogate", "\x00\x01", "👩‍👩‍👧 ‮", "a" * 10_000]
    assert encoder.encode(hostile).tokens.isfinite().all()


def test_no_prompts_are_no_rows(encoder):
    assert encoder.encode([]).tokens.shape[0] == 0


def test_every_parameter_learns(encoder):
    encoder.zero_grad()
    weights = torch.randn(16, generator=torch.Generator().manual_seed(0))
    (encoder.encode(["a red circle", None]).pooled @ weights).square().sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_identity_follows_the_weights(encoder):
    torch.manual_seed(0)
    twin = WordsEncoder(encoder.config)
    assert twin.identity() == encoder.identity()
    with torch.no_grad():
        twin.null[0] += 1
    assert twin.identity() != encoder.identity()


def test_heads_must_divide_the_channels():
    with pytest.raises(pydantic.ValidationError, match="multiple of num_heads"):
        WordsConfig(channels=10, num_heads=4)
