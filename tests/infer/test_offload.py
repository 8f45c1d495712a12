"""Weights that come and go change nothing but where they are."""

import numpy as np
import pytest
import torch

from opensora.errors import UsageError
from opensora.infer.offload import BlockStream
from opensora.infer.pipeline import SamplingConfig
from opensora.infer.placing import place, stream_blocks
from opensora.infer.savings import SavingsConfig
from tests.infer.conftest import build_pipeline
from tests.infer.test_caching import condition, model_of, noise

QUICK = SamplingConfig.model_validate({"schedule": {"num_steps": 3}, "guidance": {"scale": 2.0}})
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["stdit", "mmdit"])
@pytest.mark.parametrize("ahead", [1, 2, 9])
def test_streamed_blocks_compute_the_same_bits(kind, ahead):
    model = model_of(kind)
    held = {name: id(value) for name, value in model.named_parameters() if "blocks" in name}
    with torch.no_grad():
        plain = model(noise(2), torch.tensor([0.3, 0.9]), condition(2))
        stream = BlockStream(model, CPU, ahead=ahead)
        for _ in range(2):
            found = model(noise(2), torch.tensor([0.3, 0.9]), condition(2))
            assert torch.equal(found, plain)
    count = len(model.blocks)
    assert stream.most == min(ahead + 1, count)
    assert len(stream.present) == min(ahead, count - 1)
    stream.close()
    assert {n: id(v) for n, v in model.named_parameters() if "blocks" in n} == held
    with torch.no_grad():
        assert torch.equal(model(noise(2), torch.tensor([0.3, 0.9]), condition(2)), plain)


def test_a_block_computes_with_its_copy_and_leaves_it():
    model, seen = model_of("stdit"), []
    first = model.blocks[1]
    host = first.mlp.fc1.weight
    first.mlp.register_forward_pre_hook(lambda module, _: seen.append(module.fc1.weight))
    stream = BlockStream(model, CPU)
    with torch.no_grad():
        model(noise(1), torch.ones(1), condition(1))
    assert seen[0] is not host and seen[0].data_ptr() != host.data_ptr()
    assert torch.equal(seen[0], host)
    assert first.mlp.fc1.weight is host
    assert stream.fetched == len(model.blocks) + 1  # and the first again, for the next step


def test_blocks_that_a_cache_skips_do_not_stay():
    model = model_of("stdit")
    stream = BlockStream(model, CPU, ahead=2)
    with torch.no_grad():
        model(noise(1), torch.ones(1), condition(1))
        tokens = torch.zeros(1, 3, 4, 16)
        s = model.enter(noise(1), torch.ones(1), condition(1))
        for number in (0, 3):
            model.blocks[number](tokens, s.text, s.mask, s.modulation, s.places)
            assert stream.present == [(number + 1) % 6, (number + 2) % 6]
    assert stream.most == 3


def test_a_block_that_fails_is_cleared_up():
    model = model_of("stdit")
    stream = BlockStream(model, CPU)
    with pytest.raises(RuntimeError), torch.no_grad():
        model.blocks[2](torch.zeros(1, 1, 1, 5), None, None, torch.zeros(1, 1, 6, 7), None)
    assert 2 not in stream.present


def test_a_model_in_training_is_refused():
    with pytest.raises(UsageError, match="eval mode"):
        BlockStream(model_of("stdit").train(), CPU)


@pytest.mark.parametrize("cache", [None, {"kind": "teacache", "threshold": 0.4}])
def test_a_pipeline_draws_the_same_video_offloaded(cache):
    tree = {**QUICK.model_dump(), "cache": cache}
    sampling = SamplingConfig.model_validate(tree)
    plain = build_pipeline()
    away = build_pipeline()
    place(away, SavingsConfig(offload=True), "cpu")
    (one,), (other,) = (p(["a red circle"], sampling=sampling) for p in (plain, away))
    assert np.array_equal(one.frames, other.frames)


def test_text_and_vae_are_there_only_while_they_work(monkeypatch):
    pipeline = build_pipeline()
    stream_blocks(pipeline, "cpu")
    trips: list[tuple[str, str]] = []
    for name in ("text", "vae"):
        part = getattr(pipeline, name)
        to = part.to
        monkeypatch.setattr(
            part, "to", lambda d, n=name, to=to: (trips.append((n, str(d))), to(d))[1]
        )
    pipeline.device = torch.device("cpu")
    pipeline(["a red circle"], sampling=QUICK)
    assert trips == [("text", "cpu")] * 4 + [("vae", "cpu")] * 2  # there and back: twice, once


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same_video_offloaded():
    plain, away = build_pipeline().to("cuda"), build_pipeline()
    place(away, SavingsConfig(offload=True, ahead=2), "cuda")
    (one,), (other,) = (p(["a red circle"], sampling=QUICK) for p in (plain, away))
    assert np.array_equal(one.frames, other.frames)
    assert all(p.device.type == "cpu" for b in away.model.blocks[3:] for p in b.parameters())
