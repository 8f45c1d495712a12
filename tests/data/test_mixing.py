"""Steps that mix shapes: the same samples for any ranks and costs, none lost, none repeated."""

from collections import Counter

import numpy as np
import pytest
from data_support import FakeRead, assign, buckets, make_manifest, part_of
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.data.balance import deal
from opensora.data.clips import ClipDataset, ClipReader, ClipsConfig, Quarantine
from opensora.data.loading import batches
from opensora.data.mixing import MixedDataset, MixedPlan
from opensora.data.plan import NUM_SPARES
from opensora.data.sources import tokens
from opensora.errors import UsageError

SHAPES = {"64px": {1: [1, 12], 5: [1, 7], 17: [1, 4]}}


def mixed(num_rows) -> dict:
    """Still pictures, short and long clips in turn."""
    return {"num_frames": np.choose(np.arange(num_rows) % 3, [1, 8, 24])}


def make_plan(folder, num_rows, *, keep=1.0, seed=0, cost=tokens) -> MixedPlan:
    shapes = {"64px": {length: [keep, size] for length, (_, size) in SHAPES["64px"].items()}}
    manifest = make_manifest(folder, num_rows, **mixed(num_rows))
    config = buckets(shapes, aspect_ratios=["1:1"])
    return MixedPlan(assign(manifest, config, seed=seed), seed=seed, cost=cost)


def rows_of(plan, steps) -> list[int]:
    return [row for step in steps for row in plan.batch(step).rows.tolist()]


@settings(max_examples=40, deadline=None)
@given(num_rows=st.integers(1, 60), seed=st.integers(0, 5), num_epochs=st.integers(1, 6))
def test_the_stream_of_steps_is_one_permutation_after_another(
    tmp_path_factory, num_rows, seed, num_epochs
):
    plan = make_plan(tmp_path_factory.getbasetemp(), num_rows, seed=seed)
    stream, step = [], 0
    while len(stream) < num_epochs * num_rows:
        batch = plan.batch(step)
        assert len(batch.rows)  # no step is empty
        stream += zip(batch.epochs.tolist(), batch.rows.tolist(), strict=True)
        step += 1
    for epoch in range(num_epochs):
        own = stream[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(own) == [(epoch, row) for row in range(num_rows)]


@settings(max_examples=20, deadline=None)
@given(
    keep=st.sampled_from([1.0, 0.6]),
    seed=st.integers(0, 3),
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=6),
)
def test_any_step_is_what_the_walk_from_the_start_meets(tmp_path_factory, keep, seed, steps):
    folder = tmp_path_factory.getbasetemp()
    walking, jumping = (make_plan(folder, 50, keep=keep, seed=seed) for _ in range(2))
    walk = [walking.batch(step) for step in range(41)]
    for step in steps:
        found = jumping.batch(step)
        for name in ("rows", "buckets", "epochs"):
            assert np.array_equal(getattr(found, name), getattr(walk[step], name))


def test_costs_and_ranks_decide_who_reads_and_never_what_is_read(tmp_path):
    plan = make_plan(tmp_path, 60)
    other = make_plan(tmp_path, 60, cost=lambda bucket: 1.0 / bucket.num_tokens)
    assert other.identity == plan.identity
    assert make_plan(tmp_path, 60, seed=1).identity != plan.identity
    for step in range(30):
        whole = sorted(plan.batch(step).rows.tolist())
        for chosen in (plan, other):
            for ranks in (1, 2, 3, 4):
                shares = [chosen.local(step, part_of(rank, ranks)) for rank in range(ranks)]
                pieces = [piece for share in shares for piece in share.pieces]
                assert sorted(row for p in pieces for row in p.rows.tolist()) == whole
                assert all(share.pieces and share.stand_in is None for share in shares)
                for piece in pieces:
                    at_once = -(-piece.bucket.batch_size // ranks)
                    assert 1 <= len(piece.rows) <= at_once  # the memory of unmixed steps


def test_a_mixed_step_weighs_as_much_as_the_steps_of_the_buckets(tmp_path):
    plan = make_plan(tmp_path, 90)
    sizes = np.array([bucket.batch_size for bucket in plan.buckets])
    weights = [(1 / sizes[plan.batch(step).buckets]).sum() for step in range(200)]
    # Where one step ends the next begins, so sums are off by one clip's weight at either end.
    assert np.cumsum(weights) == pytest.approx(np.arange(1, 201), abs=0.25)
    assert all(abs(weight - 1) <= 0.25 for weight in weights)
    shapes = [len(set(plan.batch(step).buckets.tolist())) for step in range(200)]
    assert np.mean(shapes) > 2


def test_stand_ins_for_unreadable_rows_are_the_same_on_any_ranks(tmp_path):
    plan = make_plan(tmp_path, 60)
    for step in range(10):
        seen = []
        for ranks in (1, 2, 4):
            pieces = [p for r in range(ranks) for p in plan.local(step, part_of(r, ranks)).pieces]
            rows = np.concatenate([piece.rows for piece in pieces])
            spares = np.concatenate([piece.spares for piece in pieces])
            assert spares.shape == (len(rows), NUM_SPARES)
            seen.append({row: tuple(s) for row, s in zip(rows.tolist(), spares, strict=True)})
            for piece in pieces:  # of the same bucket
                assert {int(s) % 3 for s in piece.spares.flat} == {int(piece.rows[0]) % 3}
        assert seen[0] == seen[1] == seen[2]


def test_rows_that_an_epoch_leaves_out_stand_in_for_none_of_it(tmp_path):
    plan = make_plan(tmp_path, 60, keep=0.5)
    for step in range(30):
        for piece in plan.local(step, part_of(0, 1)).pieces:
            index = plan.buckets.index(piece.bucket)
            kept = plan._assign(piece.epoch).rows_of(index)
            epochs = plan.batch(step).epochs
            if (epochs == piece.epoch).all():
                assert set(piece.spares.flat) <= set(kept.tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_of_a_mixed_step_are_read_by_shape(tmp_path, workers):
    plan = make_plan(tmp_path, 30)
    manifest = make_manifest(tmp_path, 30, **mixed(30))
    config = buckets(SHAPES, aspect_ratios=["1:1"])
    reader = ClipReader(manifest, config, ClipsConfig(start="first"), seed=0, read=FakeRead())
    dataset = MixedDataset(ClipDataset(reader, Quarantine(30, 0.5)))
    found = batches(dataset, plan, 4, num_steps=3, num_workers=workers)
    for step, batch in enumerate(found, 4):
        whole = plan.batch(step)
        ids = [i for piece in batch.pieces for i in piece.sample_ids.tolist()]
        assert sorted(ids) == sorted(whole.rows.tolist())
        for piece in batch.pieces:
            lengths = {(1, 5, 17)[row % 3] for row in piece.sample_ids.tolist()}
            assert {piece.pixels.shape[2]} == lengths


def test_ranks_that_the_steps_cannot_be_dealt_to_are_refused(tmp_path):
    plan = make_plan(tmp_path, 30)
    plan.check_parts(lambda bucket: 4)
    with pytest.raises(UsageError, match="batch size of 4, too few for 5 data-parallel ranks"):
        plan.check_parts(lambda bucket: 5)
    by_threes = lambda bucket: 3 if bucket.num_frames == 17 else 2  # noqa: E731
    with pytest.raises(UsageError, match="2 and 3 groups of ranks"):
        plan.check_parts(by_threes)


@settings(max_examples=200, deadline=None)
@given(
    clips=st.lists(
        st.tuples(st.floats(0.1, 100), st.sampled_from([1, 2, 4, 8])), min_size=1, max_size=40
    ),
    ranks=st.sampled_from([8, 16]),
)
def test_dealing_keeps_every_clip_and_the_bound_of_list_scheduling(clips, ranks):
    costs, widths = (np.array(column) for column in zip(*clips, strict=True))
    shares = deal(costs, widths, ranks)
    for clip, width in enumerate(widths.tolist()):
        holders = [rank for rank, share in enumerate(shares) if clip in share]
        first = holders[0]
        assert holders == list(range(first, first + width))
        assert first % width == 0
    assert Counter(c for share in shares for c in share) == Counter(
        {clip: int(width) for clip, width in enumerate(widths)}
    )
    loads = [sum(costs[c] / widths[c] for c in share) for share in shares]
    # Who gets a clip had no more than the mean, so nobody ends above the mean and that clip.
    assert max(loads) <= np.mean(loads) + (costs / widths).max() * (1 + 1e-9)
    # Of the clips that a group shares or that are shared by more, its ranks know the same order.
    for width in (2, 4, 8):
        for first in range(0, ranks, width):
            group = shares[first : first + width]
            orders = [[clip for clip in share if widths[clip] >= width] for share in group]
            assert all(order == orders[0] for order in orders)
            assert all(share[: len(orders[0])] == orders[0] for share in group)
    if len(clips) >= ranks and (widths == 1).all():
        assert all(shares)


def test_dealing_by_cost_beats_dealing_by_count():
    costs = np.array([8.0, 1, 1, 1, 1, 1, 1, 1, 1])
    shares = deal(costs, np.ones(9, int), 2)
    assert [sum(costs[c] for c in share) for share in shares] == [8, 8]
