"""What cannot be loaded is refused in one line, and nothing in a model folder is executed."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora.errors import MissingPackageError, UsageError
from opensora.text.clip import CLIPTextConfig, CLIPTextEncoder
from opensora.text.t5 import T5Config, T5Encoder


def refusal(folder, encoder=T5Encoder, config=T5Config, **settings) -> str:
    """The one line that an encoder of this folder is refused with."""
    with pytest.raises(UsageError) as caught:
        encoder(config(path=str(folder), **settings))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 64
    return message


@pytest.fixture
def folder(t5_folder, tmp_path):
    """A copy of the tiny T5 to damage."""
    return shutil.copytree(t5_folder, tmp_path / "t5")


def test_without_transformers_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"opensora\[text\]"):
        T5Encoder(T5Config(path=str(tmp_path)))


@pytest.mark.parametrize("path", ["./absent", "/absent/t5", "~/absent", "weights/t5/xxl"])
def test_a_folder_that_is_absent_is_told_without_asking_the_hub(t5_folder, path):
    assert "is not a folder" in refusal(path)


def test_a_hub_repository_that_cannot_be_reached_is_told(t5_folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "'nobody/nothing' cannot be loaded" in refusal("nobody/nothing")


def test_an_empty_folder_is_refused(t5_folder, tmp_path):
    assert "cannot be loaded" in refusal(tmp_path)


def test_another_family_of_models_is_refused(t5_folder, clip_folder):
    assert "is a 'clip_text_model' model" in refusal(clip_folder)
    assert "is a 't5' model" in refusal(t5_folder, CLIPTextEncoder, CLIPTextConfig)


def test_pickled_weights_are_not_read(folder):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "cannot be loaded" in refusal(folder)


def test_incomplete_weights_are_refused_rather_than_drawn_at_random(folder):
    weights = load_file(folder / "model.safetensors")
    removed = next(name for name in weights if name.endswith("wo.weight"))
    del weights[removed]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"lacks 1 of its weights ('{removed}'" in refusal(folder)


def test_torn_weights_are_refused(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "cannot be loaded" in refusal(folder)


def test_code_in_a_model_folder_is_never_run(folder):
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "cannot be loaded" in refusal(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    refusal(folder)
    assert not (folder / "ran").exists()


def test_a_tokenizer_must_be_able_to_pad_and_to_end(write, folder):
    write.tokenizer(folder, template="")
    assert "adds no end token" in refusal(folder)
    write.tokenizer(folder, pad_token=None)
    assert "has no padding token" in refusal(folder)


def test_a_tokenizer_of_another_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 8}
    weights = load_file(folder / "model.safetensors")
    name = next(name for name, tensor in weights.items() if len(tensor) == 32 and "shared" in name)
    weights[name] = weights[name][:8].clone()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "do not belong together" in refusal(folder)


def test_the_tokenizer_may_lie_elsewhere(folder, tmp_path):
    expected = T5Encoder(T5Config(path=str(folder), dtype="float32"))
    (tmp_path / "words").mkdir()
    for file in folder.glob("tokenizer*"):
        shutil.move(file, tmp_path / "words")
    assert "has no vocabulary" in refusal(folder)
    moved = T5Encoder(
        T5Config(path=str(folder), tokenizer_path=str(tmp_path / "words"), dtype="float32")
    )
    assert torch.equal(moved.encode(["a red"]).tokens, expected.encode(["a red"]).tokens)
    assert moved.identity() == expected.identity()


def test_identity_follows_weights_vocabulary_and_settings_but_not_the_place(t5_folder, folder):
    def identity(path, **settings):
        return T5Encoder(T5Config(path=str(path), dtype="float32", **settings)).identity()

    original = identity(t5_folder)
    assert identity(folder) == original
    assert identity(folder, max_length=7) != original
    assert T5Encoder(T5Config(path=str(folder), dtype="bfloat16")).identity() != original
    vocabulary = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(vocabulary.replace('"red"', '"crimson"'))
    assert identity(folder) != original
    (folder / "tokenizer.json").write_text(vocabulary)
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert identity(folder) != original
