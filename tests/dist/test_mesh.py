"""Layouts are checked before anything starts, and say who shares what."""

import pytest

from opensora.dist.mesh import Layout, ParallelConfig, resolve
from opensora.errors import UsageError


@pytest.mark.parametrize(
    ("config", "ranks", "shards", "sizes"),
    [
        ({}, 1, False, (1, 1, 1, 1, 1)),
        ({}, 8, False, (8, 1, 1, 1, 1)),
        ({}, 8, True, (1, 8, 1, 1, 1)),
        ({"ulysses": 2}, 8, True, (1, 4, 1, 2, 1)),
        ({"ulysses": 2, "ring": 2}, 8, False, (2, 1, 2, 2, 1)),
        ({"dp_replicate": 2}, 8, True, (2, 4, 1, 1, 1)),
        ({"dp_shard": 2, "ulysses": 2}, 8, True, (2, 2, 1, 2, 1)),
    ],
)
def test_what_is_left_goes_to_copies_or_shards(config, ranks, shards, sizes):
    assert resolve(ParallelConfig(**config), ranks, shards=shards).sizes == sizes


@pytest.mark.parametrize(
    ("config", "ranks", "shards", "message"),
    [
        ({"ulysses": 3}, 8, False, "there are 8"),
        ({"ulysses": 2}, 1, False, "ulysses=2 = 2 ranks, but there are 1"),
        ({"dp_replicate": 2, "dp_shard": 2}, 8, True, "= 4 ranks, but there are 8"),
        ({"dp_shard": 2}, 2, False, "engine.kind=fsdp"),
    ],
)
def test_axes_that_do_not_fit_are_refused_with_a_way_out(config, ranks, shards, message):
    with pytest.raises(UsageError, match=message):
        resolve(ParallelConfig(**config), ranks, shards=shards)


def test_a_clip_is_shared_by_as_few_ranks_as_keep_to_the_limit():
    layout = Layout(ring=2, ulysses=4)
    assert layout.degrees == [1, 2, 4, 8]
    assert [layout.degree_for(n, 100) for n in (1, 100, 101, 400, 401, 9999)] == [1, 1, 2, 4, 8, 8]
    assert layout.degree_for(1, None) == 8
    assert Layout().degrees == [1]
