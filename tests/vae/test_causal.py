"""The causal VAE: a clip in chunks is the clip whole, and no frame sees the future."""

import pydantic
import pytest
import torch
from torch.testing import assert_close

from opensora.errors import UsageError
from opensora.vae.causal import CausalVAE, CausalVAEConfig

EXACT = {"rtol": 0.0, "atol": 1e-12}
"""float64 sums of at most 432 products (16 channels, 27 taps) in another order, through 12 layers
of values of about one: 432 * 12 * 2.2e-16."""

LAYOUTS = {
    "both": {},
    "time once": {"temporal_down": (False, True)},
    "time in the fine step": {"temporal_down": (True, False)},
    "space once": {"spatial_down": (True, False), "patch": 4},
    "long kernels": {"temporal_kernel": (1, 5, 3)},
}


@pytest.fixture(scope="module")
def exact(build_vae):
    """The same weights in float64."""
    return build_vae().double()


def clip(num_frames: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(2, 3, num_frames, side, side, generator=generator, dtype=torch.float64) * 2 - 1
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk", [1, 2, 9])
def test_in_chunks_equals_whole(build_vae, layout, chunk):
    vae = build_vae(**LAYOUTS[layout]).double()
    pixels = clip(1 + 4 * vae.stride[0])
    with torch.no_grad():
        latents = vae.encode(pixels)
        assert latents.shape[2] == 5
        assert_close(vae.encode(pixels, chunk=chunk), latents, **EXACT)
        assert_close(vae.decode(latents, chunk=chunk), vae.decode(latents), **EXACT)


def test_in_float32_chunks_equal_whole_to_rounding(vae):
    pixels = clip(21).float()
    with torch.no_grad():
        latents = vae.encode(pixels)
        # The float64 bound with 2^29 times the rounding, and usually far below it.
        assert_close(vae.encode(pixels, chunk=2), latents, rtol=0, atol=6e-4)
        assert_close(vae.decode(latents, chunk=2), vae.decode(latents), rtol=0, atol=6e-4)


def test_the_first_frame_alone_is_an_image(exact):
    pixels = clip(9)
    with torch.no_grad():
        latents = exact.encode(pixels)
        image = exact.encode(pixels[:, :, :1])
        assert image.shape == (2, 4, 1, 2, 2)
        assert_close(image, latents[:, :, :1], **EXACT)
        assert_close(exact.decode(image), exact.decode(latents)[:, :, :1], **EXACT)


def test_a_prefix_is_coded_as_if_nothing_followed(exact):
    pixels = clip(17)
    with torch.no_grad():
        latents = exact.encode(pixels)
        assert_close(exact.encode(pixels[:, :, :9]), latents[:, :, :3], **EXACT)
        assert_close(exact.decode(latents[:, :, :3]), exact.decode(latents)[:, :, :9], **EXACT)


def test_gradients_never_come_from_the_future(exact):
    pixels = clip(13).requires_grad_()
    mean, _ = exact.posterior(pixels)
    for frame in range(mean.shape[2]):
        (gradient,) = torch.autograd.grad(
            mean[:, :, frame].square().sum(), pixels, retain_graph=True
        )
        reached = gradient.abs().sum(dim=(0, 1, 3, 4)) > 0
        assert reached[4 * frame]
        assert not reached[4 * frame + 1 :].any()
    latents = mean.detach().requires_grad_()
    video = exact.reconstruct(latents)
    for frame in range(video.shape[2]):
        (gradient,) = torch.autograd.grad(
            video[:, :, frame].square().sum(), latents, retain_graph=True
        )
        reached = gradient.abs().sum(dim=(0, 1, 3, 4)) > 0
        present = -(-frame // 4)
        assert reached[present]
        assert not reached[present + 1 :].any()


def test_a_clip_does_not_feel_its_batch(exact):
    pixels = clip(5)
    with torch.no_grad():
        both = exact.encode(pixels)
        assert_close(exact.encode(pixels[1:]), both[1:], **EXACT)
        assert_close(exact.decode(both[1:]), exact.decode(both)[1:], **EXACT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_follow_the_stride(build_vae, layout):
    vae = build_vae(**LAYOUTS[layout])
    time, down, across = vae.stride
    assert (down, across) == (8, 8)
    pixels = torch.zeros(1, 3, 1 + 2 * time, 3 * down, 2 * across)
    with torch.no_grad():
        latents = vae.encode(pixels)
        assert latents.shape[1:] == vae.latent_shape(*pixels.shape[2:]) == (4, 3, 3, 2)
        assert vae.decode(latents).shape == pixels.shape


@pytest.mark.parametrize("size", [(16, 64, 64), (17, 60, 64), (17, 64, 12)])
def test_clips_that_do_not_divide_are_refused(vae, size):
    frames, height, width = size
    with pytest.raises(UsageError, match=f"{frames} frames of {height}x{width}.* 1 \\+ 4k frames"):
        vae.encode(torch.zeros(1, 3, *size))


def test_latents_leave_normalised(exact, build_vae):
    pixels = clip(5)
    with torch.no_grad():
        raw, _ = exact.posterior(pixels)
        restored = exact.encode(pixels) * exact.latent_std.view(-1, 1, 1, 1)
        assert_close(restored + exact.latent_mean.view(-1, 1, 1, 1), raw, **EXACT)
        raw_statistics = (raw.mean(dim=(0, 2, 3, 4)), raw.std(dim=(0, 2, 3, 4)))
        own = build_vae().double()
        own.latent_mean.copy_(raw_statistics[0])
        own.latent_std.copy_(raw_statistics[1])
        latents = own.encode(pixels)
    assert_close(latents.mean(dim=(0, 2, 3, 4)), torch.zeros(4, dtype=torch.float64), **EXACT)
    assert_close(latents.std(dim=(0, 2, 3, 4)), torch.ones(4, dtype=torch.float64), **EXACT)


def test_statistics_are_part_of_the_weights(vae):
    assert {"latent_mean", "latent_std"} <= vae.state_dict().keys()


def test_decoded_pixels_stay_in_range(vae):
    with torch.no_grad():
        assert vae.decode(100 * torch.randn(1, 4, 2, 2, 2)).abs().max() <= 1


def test_streamed_pieces_are_the_clip(exact):
    latents = torch.randn(1, 4, 5, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        pieces = list(exact.stream(latents, chunk=2))
        assert [piece.shape[2] for piece in pieces] == [5, 8, 4]
        assert_close(torch.cat(pieces, dim=2), exact.decode(latents), **EXACT)


def test_streaming_needs_the_memory_of_a_chunk_whatever_the_length(vae, peak_memory):
    def peak(num_frames: int, *, streamed: bool) -> int:
        latents = torch.zeros(1, 4, num_frames, 2, 2)
        if not streamed:
            return peak_memory(lambda: vae.decode(latents))

        def drop_pieces():
            for _ in vae.stream(latents):
                pass

        return peak_memory(drop_pieces)

    assert peak(12, streamed=True) == peak(4, streamed=True)
    assert peak(12, streamed=False) > 4 * peak(12, streamed=True)


def test_the_cache_keeps_frames_rather_than_chunks(vae):
    cache = {}
    with torch.no_grad():
        vae.posterior(torch.zeros(1, 3, 17, 16, 16), cache)
    assert cache
    for kept in cache.values():
        assert kept.untyped_storage().nbytes() == kept.nbytes
        assert kept.numel() == 0 or kept.shape[1] <= 2


def test_every_parameter_learns(exact):
    pixels = clip(5)
    mean, log_variance = exact.posterior(pixels)
    (exact.reconstruct(mean).square().sum() + log_variance.square().sum()).backward()
    without = [name for name, p in exact.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    exact.zero_grad()


def test_a_fresh_vae_is_a_smooth_map():
    """Residual branches start at zero and shortcuts average: pixels come in, no noise is added."""
    torch.manual_seed(0)
    vae = CausalVAE(CausalVAEConfig(widths=(8, 16, 16)))
    branches = [m.conv2.weight for m in vae.modules() if hasattr(m, "conv2")]
    assert branches
    assert not any(weight.any() for weight in branches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (1, 1)}, "blocks needs one entry for each of the 3 widths"),
        ({"spatial_down": (True,)}, "spatial_down needs 2 entries"),
        ({"temporal_kernel": (1, 2, 3)}, "must be odd"),
        ({"widths": (8, 12, 16)}, "widths 8 and 12"),
        ({"latent_channels": 0}, "greater than or equal to 1"),
        ({"depth": 3}, "Extra inputs"),
    ],
)
def test_layouts_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        CausalVAEConfig(**({"widths": (8, 16, 16)} | changes))
