"""Remembered features equal fresh ones, and the memory is bounded."""

import pytest
import torch

from opensora.errors import UsageError
from opensora.text.features import CachedEncoder
from opensora.text.words import WordsConfig, WordsEncoder
from opensora.types import Condition


class CountingEncoder(torch.nn.Module):
    """Frozen; tokens count up within a prompt; remembers what it was asked."""

    trainable = False
    channels = pooled_channels = 4

    def __init__(self):
        super().__init__()
        self.asked = []

    def encode(self, prompts):
        self.asked += prompts
        length = max(1, *map(len, prompts)) if len(prompts) > 1 else max(1, len(prompts[0]))
        tokens = torch.arange(1.0, length + 1)[None, :, None].expand(len(prompts), -1, 4)
        mask = torch.ones(len(prompts), length, dtype=torch.bool)
        return Condition(tokens=tokens.clone(), mask=mask, pooled=tokens.mean(1))

    def identity(self):
        return "counting"


def test_each_prompt_is_encoded_once_and_alone():
    encoder = CountingEncoder()
    cached = CachedEncoder(encoder)
    first = cached.encode(["ab", None, "abc", "ab"])
    second = cached.encode(["abc", ""])
    assert encoder.asked == ["ab", "", "abc"]
    assert first.mask.sum(1).tolist() == [2, 1, 3, 2]
    assert first.tokens[0, :, 0].tolist() == [1, 2, 0]
    assert torch.equal(second.tokens[0], first.tokens[2])
    assert torch.equal(second.pooled, first.pooled[[2, 1]])


def test_the_least_recently_used_leave_first():
    encoder = CountingEncoder()
    one = 2 * (4 * 4 + 1) + 4 * 4  # bytes of two tokens, their mask and the pooled vector
    cached = CachedEncoder(encoder, max_bytes=2 * one)
    cached.encode(["aa", "bb"])
    assert cached.num_bytes == 2 * one
    cached.encode(["aa"])
    cached.encode(["cc"])
    assert cached.num_bytes == 2 * one
    cached.encode(["aa"])
    assert encoder.asked == ["aa", "bb", "cc"]
    cached.encode(["bb"])
    assert encoder.asked == ["aa", "bb", "cc", "bb"]


def test_a_prompt_larger_than_the_bound_is_encoded_but_not_kept():
    cached = CachedEncoder(CountingEncoder(), max_bytes=10)
    assert cached.encode(["abcd"]).tokens.shape == (1, 4, 4)
    assert cached.num_bytes == 0


def test_it_offers_what_the_encoder_offers():
    cached = CachedEncoder(CountingEncoder())
    assert (cached.channels, cached.pooled_channels, cached.trainable) == (4, 4, False)
    assert cached.identity() == "counting"


def test_an_encoder_that_trains_is_refused():
    with pytest.raises(UsageError, match="it trains"):
        CachedEncoder(WordsEncoder(WordsConfig(channels=8, num_heads=2)))
