"""The causal convolution: two implementations, one result; no future; chunks equal the whole."""

import pytest
import torch
from torch.testing import assert_close

from opensora.ops.conv3d import (
    CausalConv3d,
    RepeatFrames,
    conv_by_stacking,
    conv_direct,
    depth_to_space,
    space_to_depth,
)

EXACT = {"rtol": 0.0, "atol": 1e-13}
"""float64 sums of at most 135 products of values of about one: 135 * 2.2e-16, with room."""

KERNELS = [(1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3), (5, 3, 1), (3, 1, 5), (4, 3, 3)]
STRIDES = [(1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 2, 2), (1, 1, 2)]
PAIRS = [
    (kernel, stride)
    for kernel in KERNELS
    for stride in STRIDES
    if all(s <= k for k, s in zip(kernel, stride, strict=True))
]


def build(kernel, stride) -> CausalConv3d:
    torch.manual_seed(0)
    conv = CausalConv3d(3, 4, kernel=kernel, stride=stride).double()
    torch.nn.init.normal_(conv.bias)
    return conv


@pytest.mark.parametrize(("kernel", "stride"), PAIRS)
def test_stacked_taps_equal_the_direct_convolution(kernel, stride):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 6, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, *kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    results = []
    for convolve in (conv_direct, conv_by_stacking):
        out = convolve(x, weight, bias, stride)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        results.append([out, *torch.autograd.grad((out * upstream).sum(), (x, weight, bias))])
    for direct, stacked in zip(*results, strict=True):
        # Gradients of weights sum over up to 420 positions.
        assert_close(stacked, direct, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kernel", "stride"), PAIRS)
def test_frames_in_chunks_equal_the_clip_whole(kernel, stride):
    conv = build(kernel, stride)
    x = torch.randn(2, 13, 4, 4, 3, dtype=torch.float64)
    whole = conv(x)
    step = stride[0]
    assert whole.shape == (2, 1 + 12 // step, 4 // stride[1], 4 // stride[2], 4)
    for chunk in (1, 2, 5):
        cache = {}
        pieces = [x[:, :1], *x[:, 1:].split(chunk * step, dim=1)]
        assert_close(torch.cat([conv(p, cache) for p in pieces], dim=1), whole, **EXACT)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (4, 1, 1)])
@pytest.mark.parametrize("time", [1, 2])
def test_no_output_sees_the_future(kernel, time):
    if time > kernel[0]:
        time = 1
    conv = build(kernel, (time, 1, 1))
    x = torch.randn(1, 9, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    out = conv(x)
    for frame in range(out.shape[1]):
        (gradient,) = torch.autograd.grad(out[:, frame].sum(), x, retain_graph=True)
        reached = gradient.abs().sum(dim=(0, 2, 3, 4)) > 0
        assert reached[time * frame]
        assert not reached[time * frame + 1 :].any()
        assert not reached[: max(0, time * frame - kernel[0] + 1)].any()


def test_the_past_of_the_first_frame_is_the_first_frame():
    conv = build((3, 3, 3), (1, 1, 1))
    frame = torch.randn(1, 1, 4, 4, 3, dtype=torch.float64)
    still = conv(frame.expand(1, 5, 4, 4, 3))
    assert_close(still, still[:, :1].expand_as(still), **EXACT)
    assert_close(conv(frame), still[:, :1], **EXACT)


def test_space_is_padded_with_zeros_evenly_or_on_the_far_side():
    weight = torch.ones(1, 1, 1, 3, 3)
    x = torch.ones(1, 1, 4, 4, 1)
    for convolve in (conv_direct, conv_by_stacking):
        even = convolve(x, weight, torch.zeros(1), (1, 1, 1))[0, 0, :, :, 0]
        assert even[0].tolist() == even[-1].tolist() == [4, 6, 6, 4]
        halved = convolve(x, weight, torch.zeros(1), (1, 2, 2))[0, 0, :, :, 0]
        assert halved.tolist() == [[9, 6], [6, 4]]


def test_the_cache_does_not_keep_chunks_alive():
    conv, cache = build((3, 3, 3), (1, 1, 1)), {}
    conv(torch.randn(1, 9, 4, 4, 3, dtype=torch.float64), cache)
    assert cache[conv].shape[1] == 2
    assert cache[conv].untyped_storage().nbytes() == cache[conv].nbytes


def test_a_stride_wider_than_the_kernel_is_refused():
    with pytest.raises(ValueError, match="widen the kernel"):
        CausalConv3d(3, 4, kernel=(1, 3, 3), stride=(2, 1, 1))


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_repeated_frames_keep_the_first_single(chunk):
    repeat = RepeatFrames()
    x = torch.arange(5.0).view(1, 5, 1, 1, 1)
    assert repeat(x).flatten().tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    cache = {}
    pieces = [repeat(piece, cache) for piece in x.split(chunk, dim=1)]
    assert torch.equal(torch.cat(pieces, dim=1), repeat(x))


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_depth_and_space_are_exchanged_without_loss(factor):
    x = torch.arange(2 * 3 * 8 * 4 * 5.0).view(2, 3, 8, 4, 5)
    folded = space_to_depth(x, factor)
    assert folded.shape == (2, 3, 8 // factor, 4 // factor, 5 * factor**2)
    assert torch.equal(depth_to_space(folded, factor), x)
    assert torch.equal(folded[0, 0, 0, 0, :5], x[0, 0, 0, 0])
