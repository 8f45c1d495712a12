"""RAFT: names of its weights, its look-up against a plain one, what holds of any weights."""

import pytest
import torch
from torch.nn.functional import grid_sample

from opensora.errors import CheckpointError, DataError
from opensora.evaluate.vbench import raft
from opensora.evaluate.vbench.raft import LEVELS, RADIUS, RAFT
from opensora.evaluate.vbench.weights import fill, read_state


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return RAFT().eval()


def test_the_state_has_the_names_and_shapes_of_raft_things(network):
    state = network.state_dict()
    assert len(state) == 179
    assert sum(p.numel() for p in network.parameters()) == 5_257_536
    expected = {
        "fnet.conv1.weight": (64, 3, 7, 7),
        "fnet.layer2.0.downsample.0.weight": (96, 64, 1, 1),
        "fnet.conv2.bias": (256,),
        "cnet.norm1.running_mean": (64,),
        "cnet.layer3.0.norm3.weight": (128,),
        "cnet.layer3.0.downsample.1.weight": (128,),
        "update_block.encoder.convc1.weight": (256, 324, 1, 1),
        "update_block.encoder.conv.weight": (126, 256, 3, 3),
        "update_block.gru.convz1.weight": (128, 384, 1, 5),
        "update_block.gru.convq2.weight": (128, 384, 5, 1),
        "update_block.flow_head.conv2.weight": (2, 256, 3, 3),
        "update_block.mask.2.weight": (576, 256, 1, 1),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected
    assert not any(name.startswith("fnet.norm") for name in state)


def test_weights_of_dataparallel_load_and_others_are_refused(tmp_path, network):
    path = tmp_path / "raft-things.pth"
    torch.save({f"module.{k}": v for k, v in network.state_dict().items()}, path)
    loaded = fill(RAFT(), read_state(path, "RAFT"), path, "RAFT")
    assert torch.equal(loaded.state_dict()["fnet.conv1.weight"], network.fnet.conv1.weight)
    assert not any(p.requires_grad for p in loaded.parameters())
    state = dict(network.state_dict())
    del state["cnet.conv2.bias"]
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'cnet\.conv2\.bias'"):
        fill(RAFT(), state, path, "RAFT")
    with pytest.raises(CheckpointError, match="should not, the tensor 'extra'"):
        fill(RAFT(), network.state_dict() | {"extra": torch.zeros(1)}, path, "RAFT")
    with pytest.raises(CheckpointError, match=r"'cnet\.conv2\.bias' has the shape \(1,\)"):
        fill(RAFT(), network.state_dict() | {"cnet.conv2.bias": torch.zeros(1)}, path, "RAFT")
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(CheckpointError, match="cannot be read as RAFT"):
        read_state(path, "RAFT")
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="not the state dict"):
        read_state(path, "RAFT")


def plain_look_up(first, second, places):
    """Every correlation by itself: the feature of the moved point in the halved second picture."""
    _, depth, height, width = first.shape
    found = torch.zeros(LEVELS, 2 * RADIUS + 1, 2 * RADIUS + 1, height, width)
    for level in range(LEVELS):
        size = 2**level
        pooled = torch.nn.functional.avg_pool2d(second, size) if level else second
        rows, columns = pooled.shape[2:]
        for y in range(height):
            for x in range(width):
                for i in range(2 * RADIUS + 1):
                    for j in range(2 * RADIUS + 1):
                        px = places[0, 0, y, x] / size + i - RADIUS
                        py = places[0, 1, y, x] / size + j - RADIUS
                        at = torch.stack([2 * px / (columns - 1) - 1, 2 * py / (rows - 1) - 1])
                        one = grid_sample(pooled, at.view(1, 1, 1, 2), align_corners=True)
                        product = (first[0, :, y, x] * one[0, :, 0, 0]).sum()
                        found[level, i, j, y, x] = product / depth**0.5
    return found.view(1, -1, height, width)


def test_the_look_up_equals_a_plain_one():
    torch.manual_seed(1)
    first, second = torch.randn(2, 1, 5, 16, 16).unbind()
    places = raft.coordinates(first) + torch.randn(1, 2, 16, 16) * 3
    fast = raft.look_up(raft.correlation_pyramid(first, second), places)
    window = (slice(None), slice(None), slice(4, 6), slice(7, 9))  # the plain one is slow
    slow = plain_look_up(first[window], second, places[window])
    # Pooling and sampling are linear, so the orders agree up to the rounding of float32.
    torch.testing.assert_close(fast[window], slow, atol=1e-5, rtol=1e-5)


def test_upsampling_is_convex_and_keeps_a_constant_flow():
    flow = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 4, 5)
    mask = torch.randn(1, 576, 4, 5)
    large = raft.upsampled(flow, mask)
    assert large.shape == (1, 2, 32, 40)
    inside = large[:, :, 8:-8, 8:-8]  # at the edge neighbours outside count as 0
    torch.testing.assert_close(
        inside, torch.tensor([16.0, -8.0]).view(1, 2, 1, 1).expand_as(inside)
    )


def test_upsampling_puts_each_eighth_where_it_belongs():
    flow = torch.arange(6.0).view(1, 1, 2, 3).expand(1, 2, 2, 3)
    mask = torch.full((1, 9, 64, 2, 3), -1e4)
    mask[:, 4] = 1e4  # the middle of the 3x3 alone
    large = raft.upsampled(flow, mask.view(1, 576, 2, 3))
    expected = 8 * flow.repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(large, expected)


def test_padding_repeats_edges_on_both_sides():
    pictures = torch.rand(1, 3, 131, 134)
    padded = raft.padded(pictures)
    assert padded.shape == (1, 3, 136, 136)
    assert torch.equal(padded[:, :, 2:133, 1:135], pictures)
    assert torch.equal(padded[:, :, 0], padded[:, :, 2])
    assert torch.equal(raft.padded(padded), padded)


def test_pictures_too_small_for_the_pyramid_are_refused(network):
    with pytest.raises(DataError, match=r"127x200 are too small .* 128"):
        network(*torch.rand(2, 1, 3, 127, 200), updates=1)


def test_the_flow_has_the_padded_size_and_the_second_picture_matters(network):
    torch.manual_seed(2)
    first, second = torch.rand(2, 1, 3, 130, 128) * 255
    flow = network(first, second, updates=2)
    assert flow.shape == (1, 2, 136, 128)
    assert torch.isfinite(flow).all()
    assert not torch.equal(flow, network(first, first, updates=2))


def test_each_pair_of_a_batch_stands_alone(network):
    torch.manual_seed(3)
    first, second = torch.rand(2, 2, 3, 128, 128) * 255
    together = network(first, second, updates=1)
    alone = torch.cat([network(first[i : i + 1], second[i : i + 1], updates=1) for i in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_correlation_is_highest_where_a_moved_picture_lies():
    torch.manual_seed(4)
    first = torch.randn(1, 64, 16, 24)
    second = torch.roll(first, (2, 3), dims=(2, 3))  # two down, three to the right
    found = raft.look_up(raft.correlation_pyramid(first, second), raft.coordinates(first))
    window = found[0, :81].view(9, 9, 16, 24)[:, :, 5:10, 6:16]
    best = window.flatten(0, 1).argmax(0)
    # The first index is x, the second y, as the published weights expect.
    assert (best == (RADIUS + 3) * 9 + RADIUS + 2).all()


def test_the_mask_of_the_upsampling_is_a_quarter_of_what_the_network_says(network, monkeypatch):
    told, used = [], []
    hook = network.update_block.mask.register_forward_hook(lambda *call: told.append(call[2]))
    monkeypatch.setattr(raft, "upsampled", lambda flow, mask: used.append(mask) or flow)
    network(*torch.rand(2, 1, 3, 128, 128) * 255, updates=2)
    hook.remove()
    assert len(told) == len(used) == 1
    assert torch.equal(used[0], told[0] / 4)
