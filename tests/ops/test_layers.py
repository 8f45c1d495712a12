"""Blocks that transformers share."""

import pytest
import torch
from torch.testing import assert_close

from opensora.ops.layers import Mlp, ScalarEmbedder, modulate, normalise, patchify, unpatchify


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 2, 3)])
def test_patches_put_together_are_the_latents(patch):
    x = torch.arange(2 * 3 * 4 * 6 * 6.0).view(2, 3, 4, 6, 6)
    tokens = patchify(x, patch)
    p, q, r = patch
    assert tokens.shape == (2, 4 // p, 36 // (q * r), 3 * p * q * r)
    assert torch.equal(unpatchify(tokens, patch, (6 // q, 6 // r)), x)


def test_a_patch_is_a_neighbourhood_with_its_channels_outermost():
    x = torch.arange(2 * 4 * 4.0).view(1, 2, 1, 4, 4)
    second = patchify(x, (1, 2, 2))[0, 0, 1]
    assert torch.equal(second, x[0, :, 0, 0:2, 2:4].flatten())


def test_modulation_is_an_affine_map():
    x, shift, scale = torch.randn(3, 2, 4).unbind(0)
    assert_close(modulate(x, shift, scale), x * (1 + scale) + shift)
    assert torch.equal(modulate(x, torch.zeros(4), torch.zeros(4)), x)


def test_the_norm_is_that_of_torch_with_a_weight_for_each_of_several():
    torch.manual_seed(0)
    x, weights = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.randn(3, 8).double()
    out = normalise(x, weights)
    for i in range(3):
        expected = torch.nn.functional.rms_norm(x[:, :, i], (8,), weights[i], 1e-6)
        assert_close(out[:, :, i], expected, rtol=0, atol=1e-14)
    assert normalise(torch.zeros(2, 8), torch.ones(8)).isfinite().all()


def test_the_norm_of_half_precision_is_taken_in_float32_without_a_warning():
    x = torch.full((1, 4096), 1.0 + 2**-7).bfloat16()
    out = normalise(x, torch.ones(4096))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.ones(1, 4096).bfloat16())


def test_an_mlp_is_two_linear_maps_around_a_gelu():
    torch.manual_seed(0)
    mlp = Mlp(4, 8, 3)
    x = torch.randn(2, 5, 4)
    hidden = torch.nn.functional.gelu(x @ mlp.fc1.weight.T + mlp.fc1.bias, approximate="tanh")
    assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)
    assert Mlp(4, 8)(x).shape == x.shape


def test_scalars_of_any_shape_are_embedded_in_the_weights_dtype():
    embedder = ScalarEmbedder(6, scale=1000.0)
    out = embedder(torch.tensor([[0.0, 0.5, 0.501]]))
    assert out.shape == (1, 3, 6)
    assert (out[0, 1] - out[0, 2]).abs().max() > 1e-3
    assert embedder.double()(torch.zeros(2)).dtype == torch.float64
