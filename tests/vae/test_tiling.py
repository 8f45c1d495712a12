"""Tiles add up to the whole picture, exactly where the overlap allows, in bounded memory."""

from itertools import pairwise

import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch.testing import assert_close

from opensora.errors import UsageError
from opensora.vae.tiling import (
    TilingConfig,
    decode_tiled,
    encode_tiled,
    exact_overlap,
    receptive_radius,
    tile_axis,
)

ROUNDING = 1e-5
"""float32 sums of up to 432 products through 12 layers of values of about one."""


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Decibels, for values in [-1, 1]."""
    return float(10 * torch.log10(4 / (a - b).square().mean()))


@pytest.fixture(scope="module")
def shallow(build_vae):
    """A VAE that sees 4 latent positions far, which keeps the pictures small."""
    return build_vae(widths=(4, 8, 8), blocks=(0, 1, 0), decoder_blocks=(0, 1, 0))


def random_latents(*size: int) -> torch.Tensor:
    return torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))


@given(
    length=some.integers(1, 200),
    tile=some.integers(2, 40),
    overlap=some.integers(0, 39),
    blend=some.integers(0, 39),
    scale=some.sampled_from([1, 2, 8]),
)
@settings(max_examples=100, deadline=None)
def test_weights_add_up_to_one_everywhere(length, tile, overlap, blend, scale):
    overlap = min(overlap, tile - 1)
    config = TilingConfig(tile=tile, overlap=overlap, blend=min(blend, overlap))
    tiles = tile_axis(length, config, scale=scale)
    total = torch.zeros(length * scale)
    for part in tiles:
        assert part.stop - part.start == min(tile, length)
        assert (part.weights >= 0).all()
        total[part.start * scale : part.stop * scale] += part.weights
    assert_close(total, torch.ones(length * scale))
    assert all(a.stop - b.start >= overlap for a, b in pairwise(tiles))


def test_the_receptive_radius_is_that_of_the_layers(vae):
    # Decoder, in latent positions: 3x3 kernels reach 1 at the latents' own size (first layer, two
    # blocks, upsampling), 1/2 at twice the size (one block, upsampling), 1/4 at four times (one
    # block, head): 4 + 1 + 0.5, and the position's far side makes it 6.
    assert receptive_radius(vae) == 6
    assert exact_overlap(vae, blend=2) == 14


def test_fewer_layers_see_less_far(shallow):
    # As above with one block at twice the size: 2 + 1 + 0.25, and the far side.
    assert receptive_radius(shallow) == 4


def test_a_network_that_sees_everything_is_told():
    class Global(torch.nn.Module):
        """Subtracts the picture's mean."""

        stride = (1, 1, 1)

        def latent_shape(self, num_frames, height, width):
            return 3, num_frames, height, width

        def encode(self, pixels, *, chunk=None):
            return pixels - pixels.mean(dim=(-1, -2), keepdim=True)

        decode = encode

    with pytest.raises(ValueError, match="Global sees more than 32"):
        receptive_radius(Global())


@pytest.mark.parametrize(("blend", "chunk"), [(0, None), (2, 1), (3, 2)])
def test_with_the_exact_overlap_tiles_equal_the_whole(shallow, blend, chunk):
    latents = random_latents(3, 13, 16)
    overlap = exact_overlap(shallow, blend=blend)
    tiling = TilingConfig(tile=overlap + 2, overlap=overlap, blend=blend)
    with torch.no_grad():
        whole = shallow.decode(latents)
        tiled = decode_tiled(shallow, latents, tiling=tiling, chunk=chunk)
        assert_close(tiled, whole, rtol=0, atol=ROUNDING)
        again = encode_tiled(shallow, whole, tiling=tiling, chunk=chunk)
        assert_close(again, shallow.encode(whole), rtol=0, atol=ROUNDING)


def test_any_stride_and_its_chunks_are_honoured():
    class Repeat:
        """Repeats positions 2 times down and 3 times across; remembers the chunks asked for."""

        stride = (1, 2, 3)

        def __init__(self):
            self.chunks = set()

        def latent_shape(self, num_frames, height, width):
            return 3, num_frames, height // 2, width // 3

        def decode(self, latents, *, chunk=None):
            self.chunks.add(chunk)
            return latents.repeat_interleave(2, dim=-2).repeat_interleave(3, dim=-1)

        def encode(self, pixels, *, chunk=None):
            self.chunks.add(chunk)
            return pixels[..., ::2, ::3]

    vae, tiling = Repeat(), TilingConfig(tile=5, overlap=3, blend=1)
    latents = torch.randn(2, 3, 2, 17, 11)
    pixels = decode_tiled(vae, latents, tiling=tiling, chunk=7)
    assert_close(pixels, vae.decode(latents, chunk=7))
    assert_close(encode_tiled(vae, pixels, tiling=tiling, chunk=7), latents)
    assert vae.chunks == {7}


def test_less_than_the_exact_overlap_is_not_exact(shallow):
    latents = random_latents(1, 18, 18)
    overlap = exact_overlap(shallow, blend=2) - 2
    tiling = TilingConfig(tile=overlap + 2, overlap=overlap, blend=2)
    with torch.no_grad():
        error = decode_tiled(shallow, latents, tiling=tiling) - shallow.decode(latents)
    assert error.abs().max() > 10 * ROUNDING


def test_the_default_overlap_of_8_leaves_seams_above_50_decibels(vae):
    """On white latents through random weights, which are harsher than any picture."""
    latents, tiling = random_latents(1, 12, 32), TilingConfig(tile=16)
    assert tiling.overlap == 8
    with torch.no_grad():
        whole = vae.decode(latents)
        assert psnr(decode_tiled(vae, latents, tiling=tiling), whole) > 50
        no_overlap = TilingConfig(tile=16, overlap=0, blend=0)
        assert psnr(decode_tiled(vae, latents, tiling=no_overlap), whole) < 40


def test_memory_does_not_grow_with_the_picture(shallow, peak_memory):
    tiling = TilingConfig(tile=6, overlap=2)

    def extra(side: int) -> tuple[int, int]:
        """Bytes at most beside arguments and results, of decoding and of encoding."""
        latents = torch.zeros(1, 4, 2, side, side)
        pixels = torch.zeros(1, 3, 5, 8 * side, 8 * side)
        decoding = peak_memory(lambda: decode_tiled(shallow, latents, tiling=tiling, chunk=1))
        encoding = peak_memory(lambda: encode_tiled(shallow, pixels, tiling=tiling, chunk=1))
        return decoding - pixels.nbytes, encoding - latents.nbytes

    one = peak_memory(lambda: shallow.decode(torch.zeros(1, 4, 2, 6, 6), chunk=1))
    small, large = extra(10), extra(14)
    # Beside one tile's activations: its pixels, and those weighted.
    assert small[0] < one + 2 * 4 * 3 * 5 * 48 * 48
    # What still grows are the tiles' weights: some floats for each cell of an axis.
    assert large[0] - small[0] < 20_000
    assert large[1] - small[1] < 20_000
    whole = peak_memory(lambda: shallow.decode(torch.zeros(1, 4, 2, 14, 14), chunk=1))
    assert whole > 2 * large[0]


def test_a_small_picture_is_coded_whole(shallow):
    latents = random_latents(1, 3, 4)
    with torch.no_grad():
        assert torch.equal(decode_tiled(shallow, latents), shallow.decode(latents))


def test_a_picture_that_does_not_divide_is_refused(shallow):
    with pytest.raises(UsageError, match="17 frames of 300x512"):
        encode_tiled(shallow, torch.zeros(1, 3, 17, 300, 512))


def test_sizes_must_fit():
    with pytest.raises(pydantic.ValidationError, match="overlap 8 must be smaller than tile 8"):
        TilingConfig(tile=8, overlap=8)
    with pytest.raises(pydantic.ValidationError, match="blend 5 must not exceed overlap 4"):
        TilingConfig(tile=8, overlap=4, blend=5)
