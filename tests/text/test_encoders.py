"""One union of configs, one table of encoders."""

import subprocess
import sys

import pytest

from opensora.config import Config, validate
from opensora.errors import UsageError
from opensora.text.encoders import TextConfig, build
from opensora.text.words import WordsEncoder


class Run(Config):
    text: TextConfig


def test_kind_chooses_the_encoder(t5_folder, clip_folder):
    t5 = {"kind": "t5", "path": str(t5_folder), "dtype": "float32"}
    clip = {"kind": "clip", "path": str(clip_folder), "max_length": 8}
    sections = [
        {"kind": "words", "channels": 16},
        t5,
        clip,
        {"kind": "t5+clip", "t5": t5, "clip": clip},
    ]
    names, identities = [], set()
    for section in sections:
        encoder = build(validate(Run, {"text": section}, where="test").text)
        names.append(type(encoder).__name__)
        identities.add(encoder.identity())
        assert encoder.encode(["a", None]).tokens.shape[2] == encoder.channels == 16
        pooled = encoder.encode(["a"]).pooled
        assert encoder.pooled_channels == (0 if pooled is None else pooled.shape[1])
    assert names == ["WordsEncoder", "T5Encoder", "CLIPTextEncoder", "T5CLIPEncoder"]
    assert len(identities) == 4


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'words'"):
        validate(Run, {"text": {"kind": "word"}}, where="test")


def test_the_table_and_the_words_encoder_need_no_transformers():
    code = (
        "import sys; from opensora.text.encoders import build; "
        "from opensora.text.words import WordsConfig; build(WordsConfig()).encode(['a']); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert WordsEncoder.trainable
