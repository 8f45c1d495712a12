"""What a plan of sampling says is what sampling does: parameters, FLOPs, memory."""

import os
import subprocess
import sys
from copy import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from opensora import zoo
from opensora.engine.flops import FlopCounter
from opensora.engine.footprint import LiveMemory
from opensora.engine.planner import Device
from opensora.errors import UsageError
from opensora.infer import choices
from opensora.infer import forecast as forecasts
from opensora.infer.forecast import WAYS, Forecast, Wanted, fitting, parts
from opensora.infer.pipeline import SamplingConfig
from opensora.infer.savings import DecodeConfig, SavingsConfig, decode
from opensora.zoo import GeneratorConfig
from tests.infer.conftest import SHAPE, build_pipeline

WANTED = Wanted(SHAPE.num_frames, SHAPE.height, SHAPE.width, steps=3, batch=2)


def mmdit(**sizes) -> GeneratorConfig:
    model = {"kind": "mmdit", "width": 64, "num_heads": 2, "rope": [8, 12, 12], **sizes}
    model |= {"text_channels": 16, "pooled_channels": 16}
    return GeneratorConfig.model_validate(
        {
            "model": model,
            "text": {"kind": "words", "channels": 16},
            "vae": {"kind": "causal", "latent_channels": 4},
        }
    )


def test_parameters_and_bytes_are_exact(pipeline):
    found = parts(pipeline.config)
    assert found.parameters == sum(p.numel() for p in pipeline.model.parameters())
    assert sum(found.blocks) + found.rest == 4 * found.parameters
    assert found.vae == sum(v.nbytes for v in pipeline.vae.state_dict().values())
    assert found.text == sum(v.nbytes for v in pipeline.text.state_dict().values())


def test_flops_are_those_of_the_denoiser(pipeline):
    prompts = ["a red circle", "a blue square"]
    words = pipeline.text.encode(prompts).tokens.shape[1]
    sampling = SamplingConfig.model_validate({"schedule": {"num_steps": 3}})
    x = torch.zeros(2, *pipeline.latent_shape(SHAPE))
    found = Forecast(pipeline.config, WANTED, words=words)
    guide = pipeline.guide(prompts, SHAPE, sampling, "", 3)
    with torch.no_grad(), FlopCounter() as counter:
        guide(x, torch.full((2, 2), 0.5))
    assert found.step_flops == counter.total
    assert found.flops == 3 * counter.total


@pytest.mark.parametrize("savings", [SavingsConfig(), SavingsConfig(quantize="int8")])
def test_stored_weights_are_what_they_take(savings):
    found = Forecast(mmdit(depth=1, single_depth=2), WANTED)
    weights = found.phases(savings, batched=True).weights
    config = found.config
    model = zoo.DENOISERS["mmdit"](config.model, in_channels=4).eval()
    plain = sum(p.nbytes for p in model.parameters())
    if savings.quantize == "none":
        assert weights == plain
        return
    pytest.importorskip("torchao", exc_type=ImportError)
    from opensora.infer.quantize import quantize

    quantize(model, "int8")
    stored = 0
    for value in model.parameters():
        held = [value.qdata, value.scale] if hasattr(value, "qdata") else [value]
        stored += sum(v.numel() * v.element_size() for v in held)
    assert weights == stored


def test_a_deep_model_follows_from_shallow_ones():
    config = mmdit(depth=7, single_depth=13)
    latents = (4, 2, 4, 4)
    quick = forecasts.denoiser(config.model, latents, 2, words=8)

    def whole():
        return forecasts.denoiser_call(config.model, latents, 2, 8)

    full = forecasts.rehearse(whole)
    assert (quick.parameters, quick.flops) == (full.parameters, full.flops)
    assert quick.forward == pytest.approx(full.forward, rel=0.01)


MEASURED = """
import sys
from pathlib import Path
import torch
from opensora import zoo
from opensora.infer.forecast import denoiser_call
from opensora.infer.savings import DecodeConfig, decode
from opensora.models.stdit import STDiTConfig
from opensora.vae.causal import CausalVAEConfig

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
with torch.no_grad():
    if sys.argv[1] == "denoiser":
        config = STDiTConfig(width=256, depth=2, num_heads=4, text_channels=64)
        _, call = denoiser_call(config, (4, 5, 32, 32), 2, 64)
    else:
        vae = zoo.build_vae(CausalVAEConfig(latent_channels=4)).eval()
        latents = torch.zeros(1, 4, 5, 16, 16)
        choice = DecodeConfig.model_validate_json(sys.argv[2])
        call = lambda: decode(vae, latents, choice)
    call()  # after it libraries have their buffers
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    call()
print(peak() - before)
"""


def measured(*arguments: str) -> int:
    """Growth of the resident peak in bytes; what is freed goes back to the system."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURED, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's count of resident memory")
def test_the_denoisers_peak_is_the_measured_one():
    config = zoo.STDiTConfig(width=256, depth=2, num_heads=4, text_channels=64)
    found = forecasts.denoiser(config, (4, 5, 32, 32), 2, words=64)
    assert found.forward == pytest.approx(measured("denoiser"), rel=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's count of resident memory")
def test_the_decoders_peak_is_the_measured_one():
    config = zoo.VAEConfig(latent_channels=4)
    found = forecasts.decoding(config, (4, 5, 16, 16), 1, DecodeConfig())
    assert found == pytest.approx(measured("vae", "{}"), rel=0.05)


@pytest.mark.parametrize("chunk", [1, 2, None])
@pytest.mark.parametrize("tile", [True, False])
def test_decoding_in_pieces_holds_what_is_told(chunk, tile, pipeline):
    """Counted tensor by tensor: what is resident has other things of this size beside it."""
    tiling = {"tile": 6, "overlap": 4}
    choice = DecodeConfig.model_validate({"chunk": chunk, "tile": tile, "tiling": tiling})
    latents = torch.zeros(2, 4, 5, 8, 10)
    with torch.no_grad(), LiveMemory() as memory:
        there = [value.detach() for value in (latents, *pipeline.vae.state_dict().values())]
        before = memory.live
        assert before == sum(value.nbytes for value in there)
        memory.reset()
        decode(pipeline.vae, latents, choice)
    found = forecasts.decoding(pipeline.config.vae, (4, 5, 8, 10), 2, choice)
    assert found == pytest.approx(memory.peak - before, rel=0.01)


def test_every_saving_takes_less_of_what_it_is_for():
    found = Forecast(mmdit(depth=4, single_depth=8), Wanted(9, 128, 128, batch=2))

    def phases(batched=True, **tree):
        return found.phases(SavingsConfig.model_validate(tree), batched=batched)

    plain = phases()
    assert phases(quantize="int8").weights < 0.5 * plain.weights
    assert phases(quantize="int8").activations < 1.05 * plain.activations
    away = phases(offload=True)
    assert away.weights < plain.weights and away.host > 0.5 * plain.weights
    assert phases(batched=False).activations < 0.6 * plain.activations
    assert phases(decode={"chunk": 1}).decode < plain.decode
    small = {"tile": True, "tiling": {"tile": 8, "overlap": 4}}
    assert phases(decode=small).decode < plain.decode
    assert plain.peak == max(plain.encode, plain.denoise, plain.decode)


def test_what_fits_is_the_first_that_does():
    found = Forecast(mmdit(depth=4, single_depth=8), Wanted(9, 128, 128, batch=2))
    plain = found.phases(*WAYS[0][:1], batched=True)
    assert fitting(found, Device(plain.peak, 1e12, 0)) == (WAYS[0][0], True, plain)
    savings, batched, phases = fitting(found, Device(plain.peak - 1, 1e12, 0))
    assert (savings, batched) != (WAYS[0][0], True)
    assert phases.peak < plain.peak
    assert fitting(found, Device(1e3, 1e12, 0)) is None
    alone = Forecast(found.config, replace(found.wanted, branches=1))
    least = min(alone.phases(s, batched=b).peak for s, b in WAYS)
    assert fitting(alone, Device(least, 1e12, 0))[1]  # there is nothing to take apart


def test_shapes_that_do_not_fit_and_missing_vaes_are_refused(pipeline):
    with pytest.raises(UsageError, match="give height=32, width=32"):
        Forecast(pipeline.config, Wanted(5, 40, 40))
    with pytest.raises(UsageError, match="give num_frames=5 or 9"):
        Forecast(pipeline.config, Wanted(6, 32, 32))
    nameless = pipeline.config.model_copy(update={"vae": None})
    with pytest.raises(UsageError, match=r"no task\.vae"):
        parts(nameless)


def test_models_are_rehearsed_without_data():
    """Forty gigabytes of weights are planned on any machine."""
    config = zoo.MMDiTConfig(text_channels=64, pooled_channels=0)
    found = forecasts.denoiser(config, (16, 2, 8, 8), 2, words=8)
    with torch.device("meta"):
        model = zoo.DENOISERS["mmdit"](config, in_channels=16)
    assert isinstance(model, nn.Module)
    assert found.parameters == sum(p.numel() for p in model.parameters()) > 1e10
    assert build_pipeline().shape == SHAPE


def test_branches_share_a_call_where_memory_is_there(pipeline, monkeypatch):
    latents, config = pipeline.latent_shape(SHAPE), pipeline.config.model
    words = pipeline.text.encode(["a"]).tokens.shape[1]
    takes = forecasts.denoiser(config, latents, 2, words=words).forward
    sampling = SamplingConfig.model_validate({"schedule": {"num_steps": 3}})

    def batched(budget):
        told = copy(pipeline)
        told.budget = budget
        return told.guide(["a"], SHAPE, sampling, "", 3).config.batched

    assert batched(choices.MARGIN * takes) is True
    assert batched(choices.MARGIN * takes - 1) is False
    assert batched(None) is True
    monkeypatch.setattr("opensora.infer.pipeline.free_bytes", lambda device: 1000.0)
    assert batched(None) is False


def test_sizes_of_public_text_encoders_are_known_and_others_are_not_guessed():
    t5 = {"kind": "t5", "path": "google/t5-v1_1-xxl", "dtype": "bfloat16"}
    clip = {"kind": "clip", "path": "openai/clip-vit-large-patch14", "dtype": "float32"}

    def size(tree):
        return forecasts.text_bytes(GeneratorConfig.model_validate({"text": tree}).text)

    layer = 4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096
    assert size(t5) == 2 * (32128 * 4096 + 24 * layer + 32 * 64 + 4096)
    block = 4 * (768**2 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    assert size(clip) == 4 * ((49408 + 77) * 768 + 12 * block + 2 * 768)
    assert size({**t5, "path": "my/own"}) == 0
