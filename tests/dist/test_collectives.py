"""Tensors change hands whole, evenly or not, and gradients find their way back."""

import pytest
import torch
from dist_support import groups, randn, run

from opensora.dist.collectives import exchange, gather, share, shares
from opensora.dist.groups import traffic

SIZES = [1, 2, 3, 4, 8]


@pytest.mark.parametrize("length", [0, 1, 5, 8, 17])
@pytest.mark.parametrize("size", SIZES)
def test_shares_cover_the_length_and_differ_by_one(length, size):
    sizes = shares(length, size)
    assert sum(sizes) == length and max(sizes) - min(sizes) <= 1
    units = [i for rank in range(size) for i in range(length)[share(length, rank, size)]]
    assert units == list(range(length))


@pytest.mark.parametrize("size", SIZES)
def test_an_exchange_shards_the_other_dim_and_its_gradient_goes_back(size):
    whole, weight = randn(2, 7, 3, 5), randn(2, 7, 3, 5, seed=1)
    layout = {"split": 3, "join": 1, "split_sizes": shares(5, size), "join_sizes": shares(7, size)}

    def work(rank, ends=groups(size)):
        mine = whole[:, share(7, rank, size)].clone().requires_grad_()
        columns = share(5, rank, size)
        out = exchange(mine, ends[rank], **layout)
        assert torch.equal(out, whole[..., columns])
        (gradient,) = torch.autograd.grad((out * weight[..., columns]).sum(), mine)
        assert torch.equal(gradient, weight[:, share(7, rank, size)])
        return True

    assert all(run(size, work))


@pytest.mark.parametrize("size", SIZES)
def test_a_gathered_parts_gradient_is_the_sum_over_ranks(size):
    whole, sizes = randn(2, 7, 3), shares(7, size)

    def work(rank, ends=groups(size)):
        mine = whole[:, share(7, rank, size)].clone().requires_grad_()
        out = gather(mine, ends[rank], dim=1, sizes=sizes)
        assert torch.equal(out, whole)
        (gradient,) = torch.autograd.grad(out.sum() * (rank + 1), mine)
        assert torch.equal(gradient, torch.full_like(mine, size * (size + 1) / 2))
        return True

    assert all(run(size, work))


def test_without_a_group_nothing_moves():
    x = randn(2, 3)
    layout = {"split": 0, "join": 1, "split_sizes": [2], "join_sizes": [3]}
    assert exchange(x, None, **layout) is x
    assert gather(x, None, dim=0, sizes=[2]) is x


def test_traffic_counts_what_leaves_a_rank():
    def work(rank, ends=groups(4)):
        x = randn(8, 12, dtype=torch.float32)
        with traffic() as ledger:
            exchange(
                x, ends[rank], split=1, join=0, split_sizes=shares(12, 4), join_sizes=[8] * 4
            )
        return ledger.sent, ledger.calls

    assert run(4, work) == [(3 * 8 * 3 * 4, 1)] * 4
