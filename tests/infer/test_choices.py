"""What memory decides is told, kept and done again; where it is full, three changes are named."""

import json
from copy import copy

import numpy as np
import pytest
import torch

from opensora import memory
from opensora.errors import OutOfMemory, UsageError
from opensora.infer import choices, samples
from opensora.infer.jobs import jobs
from opensora.infer.long import PyramidWindowConfig, stream
from opensora.infer.pipeline import SamplingConfig, Shape
from opensora.infer.records import RECORD_NAME
from opensora.infer.savings import DecodeConfig, SavingsConfig
from tests.infer.conftest import SHAPE

QUICK = SamplingConfig.model_validate({"schedule": {"num_steps": 1}, "guidance": {"scale": 1.0}})
LARGE = Shape(num_frames=9, height=64, width=64, fps=8.0)
TILING = {"tile": 4, "overlap": 2, "blend": 0}
OPEN = DecodeConfig.model_validate({"tiling": TILING})


@pytest.fixture
def open_pipeline(pipeline):
    """Whose pictures are larger than a tile, and which decides by memory."""
    found = copy(pipeline)
    found.savings = SavingsConfig(decode=OPEN)
    return found


def takes(pipeline, **way):
    """Bytes that a budget has to have for one video."""
    way = OPEN.model_copy(update={"tile": False, **way})
    size = pipeline.latent_shape(LARGE)
    return choices.MARGIN * choices.forecast.decoding(pipeline.config.vae, size, 1, way)


def test_a_video_is_decoded_whole_by_frames_or_in_tiles_as_memory_has_it(open_pipeline):
    def way(budget):
        open_pipeline.budget = budget
        found = open_pipeline.decoding(LARGE, 1)
        return found.tile, found.chunk

    whole, frames = takes(open_pipeline), takes(open_pipeline, chunk=1)
    assert whole > frames
    assert way(whole) == (False, None)
    assert way(whole - 1) == way(frames) == (False, 1)
    assert way(frames - 1) == way(0) == (True, 1)
    assert way(None) == (False, None)


def test_what_is_asked_for_is_not_decided(open_pipeline):
    open_pipeline.budget = 0
    for tile in (True, False):
        asked = OPEN.model_copy(update={"tile": tile})
        open_pipeline.savings = SavingsConfig(decode=asked)
        assert open_pipeline.decoding(LARGE, 1) == asked
    open_pipeline.savings = SavingsConfig(decode=OPEN.model_copy(update={"chunk": 2}))
    assert open_pipeline.decoding(LARGE, 1).chunk == 2
    small = SHAPE  # of one tile: there is nothing to cut
    assert open_pipeline.decoding(small, 1).tile is False


def test_a_choice_is_told_kept_and_done_again_where_memory_is_back(open_pipeline, tmp_path):
    def draw(count):
        told = []
        work = jobs(["a red circle"] * count, seed=0)
        records = samples.draw(
            open_pipeline, work, tmp_path, sampling=QUICK, shape=LARGE, suffix=".png",
            tell=told.append,
        )  # fmt: skip
        return told, [record["tiled"] for record in records]

    open_pipeline.budget = 0
    told, tiled = draw(1)
    assert tiled == [True] and "in tiles" in told[0] and "--tile-vae always" in told[0]
    open_pipeline.budget = None
    assert draw(2)[1] == [True, True]
    lines = (tmp_path / RECORD_NAME).read_text().splitlines()
    assert [json.loads(line)["tiled"] for line in lines] == [True, True]
    open_pipeline.savings = SavingsConfig(decode=OPEN.model_copy(update={"tile": False}))
    with pytest.raises(UsageError, match=r"drawn differently \(tiled\)"):
        draw(2)


def test_tiles_by_choice_are_tiles_by_request(open_pipeline):
    def frames(budget, tile="auto"):
        open_pipeline.budget = budget
        open_pipeline.savings = SavingsConfig(decode=OPEN.model_copy(update={"tile": tile}))
        return open_pipeline("a red circle", shape=LARGE, sampling=QUICK)[0].frames.astype(int)

    whole, tiles = frames(None), frames(0)
    assert not np.array_equal(whole, tiles)
    assert np.abs(tiles - frames(None, tile=True)).max() <= 1


@pytest.mark.parametrize(
    ("phase", "method", "told"),
    [
        ("denoising", "draw_latents", ("guidance.batched=false", "--batch-size 1", "--quantize")),
        ("decoding", None, ("--decode-chunk 1", "--batch-size 1", "--tile-vae always")),
    ],
)
def test_a_full_memory_names_three_changes(phase, method, told, open_pipeline, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    owner = open_pipeline if method else open_pipeline.vae
    monkeypatch.setattr(owner, method or "decode", full)
    with pytest.raises(OutOfMemory) as caught:
        open_pipeline(["a", "b"], num_inference_steps=1)
    message = str(caught.value)
    assert message.startswith(f"out of memory in {phase} 2 x 5x32x32 on cpu")
    assert all(option in message for option in told) and message.count("; or ") == 2


def test_a_full_memory_of_a_long_video_is_told_as_well(open_pipeline, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(open_pipeline, "walk", full)
    pieces = stream(
        open_pipeline, ["a"], num_frames=30, seed=0, long=PyramidWindowConfig(), sampling=QUICK
    )
    with pytest.raises(OutOfMemory, match="out of memory in denoising 1 x 5x32x32"):
        next(pieces)


def test_changes_that_are_made_are_not_named_again():
    every = SavingsConfig.model_validate(
        {"offload": True, "quantize": "int8", "decode": {"tile": True, "chunk": 1}}
    )
    for phase in ("denoising", "decoding"):
        found = choices.fixes(every, phase, SHAPE, 1, calls=1, device="cuda")
        assert [change.split()[0] for change in found] == ["fewer", "a", "a"]
        found = choices.fixes(SavingsConfig(), phase, SHAPE, 1, calls=1, device="cuda")
        assert any("--offload" in change for change in found)


def test_other_errors_stay_what_they_are(open_pipeline):
    with (
        pytest.raises(RuntimeError, match="shapes do not match"),
        choices.out_of_memory(open_pipeline.device, open_pipeline.savings, "decoding", SHAPE, 1),
    ):
        raise RuntimeError("shapes do not match")


def test_what_is_free_keeps_to_a_control_group(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    host = memory.free_bytes(cpu)
    assert host > 0 and memory.free_bytes(torch.device("mps")) == float("inf")
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("2500\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 400\n")
    assert memory.free_bytes(cpu) == 900
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(cpu) > 900
