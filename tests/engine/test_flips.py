"""No flipped byte of a checkpoint passes, and the message says where it is."""

import json
import random

import pytest
import torch

from opensora import store
from opensora.engine import checkpoint, saving
from opensora.engine.checkpoint import Snapshot
from opensora.errors import CheckpointError


def snapshot() -> Snapshot:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"block.{k}.{name}": torch.randn(shape, generator=generator)
        for k in range(3)
        for name, shape in (("weight", (6, 5)), ("bias", (6,)))
    }
    return Snapshot(
        step=7,
        config=json.dumps({"task": {"kind": "toy"}, "note": "größe"}),
        weights=tensors,
        ema={name: value * 0.5 for name, value in tensors.items()},
        optimizer={f"{name}/momentum": value.square() for name, value in tensors.items()},
        frozen={"vae.weight": torch.ones(40)},
        progress={"step": 7, "tokens": 1.5, "ingredients": {"data": "abc"}},
    )


def spans_of(content: bytes) -> list[tuple[str, int, int]]:
    """(tensor, begin, end) of a safetensors file, in bytes of the file."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return [(n, *(start + edge for edge in e["data_offsets"])) for n, e in header.items()]


def test_200_flipped_bytes_of_a_checkpoint_are_found_and_named(tmp_path):
    path = saving.save(tmp_path, snapshot(), keep=2)
    checkpoint.load(path)
    assert store.verify(path) == []
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert {"manifest.json", "config.json", "progress.json"} <= {file.name for file in files}
    assert sum(file.suffix == ".safetensors" for file in files) >= 4
    generator = random.Random(3)
    named = 0
    for number in range(210):
        file = files[number % len(files)]
        genuine = file.read_bytes()
        place = generator.randrange(len(genuine))
        damaged = bytearray(genuine)
        damaged[place] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(path)
        message = str(caught.value)
        assert "damaged" in message
        assert file.name in message
        if file.suffix == ".safetensors":
            inside = [name for name, begin, end in spans_of(genuine) if begin <= place < end]
            assert all(f"'{name}'" in message for name in inside), (place, inside, message)
            named += len(inside)
        file.write_bytes(genuine)
    assert named > 40  # most of a file is its tensors
    assert store.verify(path) == []
    checkpoint.load(path)
