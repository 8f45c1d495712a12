"""Smaller weights err within a bound; a video decoded in pieces is the same video."""

import numpy as np
import pytest
import torch

from opensora import config as configs
from opensora.errors import UsageError
from opensora.infer.pipeline import SamplingConfig, Shape
from opensora.infer.placing import place
from opensora.infer.quantize import linears_of, quantize
from opensora.infer.savings import DecodeConfig, SavingsConfig, decode
from tests.infer.conftest import build_pipeline
from tests.infer.test_caching import condition, model_of, noise

QUICK = SamplingConfig.model_validate({"schedule": {"num_steps": 3}, "guidance": {"scale": 2.0}})
HALF_STEP = {"int8": 1 / 254, "fp8": 1 / 16}
"""Largest error: of a row's largest entry with int8 (127 steps), of each entry with e4m3's three
bits of mantissa, but for what is too small to be normal."""


@pytest.fixture(scope="module")
def _torchao():
    pytest.importorskip("torchao", exc_type=ImportError)


@pytest.mark.usefixtures("_torchao")
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("kind", ["stdit", "mmdit"])
def test_no_weight_is_off_by_more_than_half_a_step(precision, kind):
    model = model_of(kind)
    before = [layer.weight.detach().clone() for layer in linears_of(model)]
    others = model.x_embedder.weight
    quantize(model, precision)
    for layer, exact in zip(linears_of(model), before, strict=True):
        found = torch.nn.functional.linear(torch.eye(exact.shape[1]), layer.weight).T
        largest = exact.abs().amax(dim=1, keepdim=True)
        bound = HALF_STEP[precision] * (largest if precision == "int8" else exact.abs())
        assert ((found - exact).abs() <= bound + 2e-4 * largest).all()
        assert (found - exact).abs().max() > 0
    assert model.x_embedder.weight is others
    plain = model_of(kind)
    with torch.no_grad():
        exact = plain(noise(2), torch.tensor([0.3, 0.9]), condition(2))
        found = model(noise(2), torch.tensor([0.3, 0.9]), condition(2))
    error = (found - exact).norm() / exact.norm()
    assert 0 < error < (0.02 if precision == "int8" else 0.1)


@pytest.mark.usefixtures("_torchao")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pipeline_draws_with_int8_streamed_or_not(dtype):
    plain, small, away = (build_pipeline() for _ in range(3))
    plain.dtype = small.dtype = away.dtype = dtype
    place(small, SavingsConfig(quantize="int8"), "cpu")
    place(away, SavingsConfig(quantize="int8", offload=True), "cpu")
    drawn = [
        p(["a red circle"], sampling=QUICK)[0].frames.astype(int) for p in (plain, small, away)
    ]
    assert 0 < np.abs(drawn[1] - drawn[0]).mean() < 4
    assert np.array_equal(drawn[1], drawn[2])
    assert small.fingerprint == "seed 0 int8"


def test_quantized_training_and_other_precisions_are_refused():
    with pytest.raises(UsageError, match="eval mode"):
        quantize(model_of("stdit").train(), "int8")
    with pytest.raises(UsageError, match="int4"):
        configs.validate(SavingsConfig, {"quantize": "int4"}, where="sample")
    with pytest.raises(UsageError, match="nothing is fetched"):
        configs.validate(SavingsConfig, {"ahead": 3}, where="sample")
    with pytest.raises(UsageError, match="chunk"):
        configs.validate(SavingsConfig, {"decode": {"chunk": 0}}, where="sample")


def test_decoding_in_chunks_or_tiles_gives_the_same_video(pipeline):
    shape = pipeline.latent_shape(Shape(num_frames=9, height=64, width=64, fps=8.0))
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = decode(pipeline.vae, latents, DecodeConfig())
        chunks = decode(pipeline.vae, latents, DecodeConfig(chunk=1))
        tiling = {"tile": 7, "overlap": 6, "blend": 0}
        tiles = decode(
            pipeline.vae,
            latents,
            DecodeConfig.model_validate({"tile": True, "chunk": 2, "tiling": tiling}),
        )
    torch.testing.assert_close(chunks, whole, rtol=1e-4, atol=1e-5)
    assert tiles.shape == whole.shape
    assert 0 < (tiles - whole).abs().mean() < 0.02


def test_a_pipeline_decodes_as_it_is_told(pipeline):
    told = build_pipeline()
    place(told, SavingsConfig(decode=DecodeConfig(chunk=1)), "cpu")
    seen = []
    inner = told.vae.reconstruct
    told.vae.reconstruct = lambda part, cache=None: (
        seen.append(part.shape[2]),
        inner(part, cache),
    )[1]
    (one,), (other,) = (p(["a red circle"], sampling=QUICK) for p in (pipeline, told))
    assert seen == [1, 1]
    assert np.abs(one.frames.astype(int) - other.frames).max() <= 1
