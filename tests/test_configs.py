"""Every file in configs/ loads, validates, builds on the meta device, and forgives a slip."""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora import config as configs
from opensora import zoo
from opensora.cli.inspect import kind_of, schemas
from opensora.errors import UsageError
from opensora.train.config import TrainConfig
from opensora.train.text_to_video import TextToVideoConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


def name_of(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


def loaded(path: Path) -> configs.Config:
    tree = configs.read(path)
    return configs.validate(schemas()[kind_of(tree)], tree, where=str(path))


def test_the_table_lists_every_file():
    text = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[`([^`]+)`\]", text, re.M) == [name_of(path) for path in FILES]
    for path in FILES:
        row = next(line for line in text.splitlines() if f"`{name_of(path)}`" in line)
        assert f"| {kind_of(configs.read(path))} |" in row


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_it_opens_with_what_it_is_and_validates(path):
    assert path.read_text(encoding="utf-8").startswith("# ")
    config = loaded(path)
    again = configs.validate(type(config), json.loads(configs.to_json(config)), where="json")
    assert again == config


TRAININGS = [path for path in FILES if kind_of(configs.read(path)) == "train"]


@pytest.mark.parametrize("path", TRAININGS, ids=name_of)
def test_its_models_build_on_the_meta_device(path):
    config = loaded(path)
    assert isinstance(config, TrainConfig)
    with torch.device("meta"):
        if not isinstance(config.task, TextToVideoConfig):
            vae = zoo.build_vae(config.task.vae)
            assert sum(p.numel() for p in vae.parameters()) > 0
            return
        vae = zoo.build_vae(config.task.vae or zoo.CausalVAEConfig())
        text = FromConfig(config)
        model = zoo.build_denoiser(config.task.model, vae=vae, text=text)
    assert all(p.is_meta for p in model.parameters())


class FromConfig:
    """The widths that the model expects; a `words` encoder is built to see that it gives them."""

    def __init__(self, config: TrainConfig):
        assert isinstance(config.task, TextToVideoConfig)
        if config.task.text.kind == "words":
            text = zoo.build_text(config.task.text)
            self.channels, self.pooled_channels = text.channels, text.pooled_channels
        else:  # a pretrained encoder's widths are in its own files
            self.channels = config.task.model.text_channels
            self.pooled_channels = config.task.model.pooled_channels


@pytest.mark.parametrize("kind", sorted(schemas()))
def test_the_schema_accepts_what_is_shown(kind):
    schema = schemas()[kind].model_json_schema()
    files = [path for path in FILES if kind_of(configs.read(path)) == kind]
    assert files
    for path in files:
        shown = json.loads(configs.to_json(loaded(path)))
        assert list(faults(shown, schema, schema)) == []
        assert list(faults({**shown, "unknown": 1}, schema, schema)) != []


def faults(value: Any, node: dict[str, Any], root: dict[str, Any], path: str = "") -> Iterator[str]:
    """What a JSON schema says against a value; the part of the standard that pydantic writes."""
    if "$ref" in node:
        yield from faults(value, root["$defs"][node["$ref"].rsplit("/", 1)[1]], root, path)
    for choices in (node.get("anyOf"), node.get("oneOf")):
        if choices and all(list(faults(value, choice, root, path)) for choice in choices):
            yield f"{path}: {value!r} is none of the choices"
    types = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    kind = node.get("type")
    wrong_bool = isinstance(value, bool) and kind in ("integer", "number")
    if kind and (not isinstance(value, types[kind]) or wrong_bool):
        yield f"{path}: {value!r} is not {kind}"
        return
    if "const" in node and value != node["const"]:
        yield f"{path}: {value!r} is not {node['const']!r}"
    if "enum" in node and value not in node["enum"]:
        yield f"{path}: {value!r} is not in {node['enum']}"
    limits = {"minimum": lambda v, x: v >= x, "maximum": lambda v, x: v <= x}
    limits |= {"exclusiveMinimum": lambda v, x: v > x, "exclusiveMaximum": lambda v, x: v < x}
    for limit, holds in limits.items():
        if limit in node and not holds(value, node[limit]):
            yield f"{path}: {value!r} breaks {limit} {node[limit]}"
    if isinstance(value, list):
        each = node.get("prefixItems", []) or [node.get("items", {})] * len(value)
        for number, (item, below) in enumerate(zip(value, each, strict=False)):
            yield from faults(item, below, root, f"{path}.{number}")
    if isinstance(value, dict):
        known = node.get("properties", {})
        more = node.get("additionalProperties", True)
        yield from (
            f"{path}: {key} is missing" for key in node.get("required", ()) if key not in value
        )
        for key, item in value.items():
            if key in known:
                yield from faults(item, known[key], root, f"{path}.{key}")
            elif more is False:
                yield f"{path}: {key} is unknown"
            elif isinstance(more, dict):
                yield from faults(item, more, root, f"{path}.{key}")


def keys_of(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key that a user may write, where the mapping has names of its own."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if not FREE_NAMES & set(path):
            yield (*path, key)
        yield from keys_of(value, (*path, key))


FREE_NAMES = {"resolutions", "num_objects", "motions", "cameras", "num_prompts", "ratios", "scores"}
"""Mappings whose keys are names or numbers of the user's own."""


def slip(word: str, dice: random.Random) -> str:
    """The word with one letter left out, doubled, replaced, or two letters exchanged."""
    at = dice.randrange(len(word))
    letter = dice.choice(string.ascii_lowercase)
    edits = [
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
        word[:at] + letter + word[at + 1 :],
        word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
    ]
    return dice.choice(edits)


def misspelt(tree: dict[str, Any], path: tuple[str, ...], name: str) -> dict[str, Any]:
    """The tree with the last key of the path written as `name`."""
    if len(path) == 1:
        return {name if key == path[0] else key: value for key, value in tree.items()}
    return {**tree, path[0]: misspelt(tree[path[0]], path[1:], name)}


def test_a_slip_in_any_key_is_told_with_the_key_that_was_meant(monkeypatch):
    for schema in schemas().values():  # made anew for every error, which 500 errors need not
        document = schema.model_json_schema()
        monkeypatch.setattr(schema, "model_json_schema", lambda document=document: document)
    dice = random.Random(0)
    asked = answered = 0
    missed = []
    for path in FILES:
        config = loaded(path)
        tree = json.loads(configs.to_json(config))
        for key in keys_of(tree):
            name = slip(key[-1], dice)
            parent = tree
            for part in key[:-1]:
                parent = parent[part]
            if name in parent or not name or key[-1] == "kind":
                continue
            asked += 1
            with pytest.raises(UsageError) as error:
                configs.validate(type(config), misspelt(tree, key, name), where="test")
            right = f"Did you mean '{key[-1]}'?" in str(error.value)
            answered += right
            missed += [] if right else [(".".join(key), name)]
    assert asked > 300
    assert answered >= 0.95 * asked, missed
