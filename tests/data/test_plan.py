"""The plan: the same batches for every layout, nothing lost, nothing repeated, any step at once."""

import time
from collections import Counter

import numpy as np
import pytest
from data_support import assign, buckets, make_manifest, part_of
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.data.manifest import from_columns
from opensora.data.packed import PackedStrings
from opensora.data.plan import NUM_SPARES, Plan, once
from opensora.errors import UsageError


def make_plan(folder, num_rows, *, batch_size=4, keep=1.0, seed=0, **columns) -> Plan:
    manifest = make_manifest(folder, num_rows, **columns)
    config = buckets(
        {"64px": {1: [keep, batch_size + 1], 17: [keep, batch_size]}}, aspect_ratios=["1:1"]
    )
    return Plan(assign(manifest, config, seed=seed), seed=seed)


def mixed(num_rows) -> dict:
    """Every third row is a still picture."""
    return {"num_frames": np.where(np.arange(num_rows) % 3 == 0, 1, 24)}


def rows_of(plan: Plan, steps) -> list[int]:
    return [row for step in steps for row in plan.batch(step).rows.tolist()]


@settings(max_examples=20, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    batch_size=st.integers(4, 9),
    seed=st.integers(0, 3),
    keep=st.sampled_from([1.0, 0.7]),
    world_size=st.sampled_from([1, 2, 4]),
    steps=st.lists(st.integers(0, 30), min_size=1, max_size=5),
)
def test_ranks_together_see_the_global_batch_in_order_at_any_step(
    tmp_path_factory, num_rows, batch_size, seed, keep, world_size, steps
):
    folder = tmp_path_factory.getbasetemp()
    try:
        sequential, jumping = (
            make_plan(folder, num_rows, batch_size=batch_size, seed=seed, keep=keep)
            for _ in range(2)
        )
    except ValueError:  # nothing was kept in epoch 0
        return
    sequence = [sequential.batch(step) for step in range(31)]
    for step in steps:
        whole = jumping.batch(step)
        parts = [jumping.local(step, part_of(rank, world_size)) for rank in range(world_size)]
        assert np.concatenate([part.rows for part in parts]).tolist() == whole.rows.tolist()
        assert np.array_equal(np.concatenate([part.spares for part in parts]), whole.spares)
        assert max(len(p.rows) for p in parts) - min(len(p.rows) for p in parts) <= 1
        assert min(len(part.rows) for part in parts) >= 1
        assert (whole.step, whole.bucket, whole.epoch) == (
            step,
            sequence[step].bucket,
            sequence[step].epoch,
        )
        assert whole.rows.tolist() == sequence[step].rows.tolist()
        assert len(whole.rows) == whole.bucket.batch_size


@settings(max_examples=30, deadline=None)
@given(num_rows=st.integers(1, 50), batch_size=st.integers(1, 8), num_epochs=st.integers(1, 9))
def test_every_row_is_seen_once_an_epoch_and_what_is_left_over_is_carried(
    tmp_path_factory, num_rows, batch_size, num_epochs
):
    plan = make_plan(
        tmp_path_factory.getbasetemp(), num_rows, batch_size=batch_size, **mixed(num_rows)
    )
    seen = Counter(rows_of(plan, range(plan.first_step(num_epochs))))
    # After e epochs a row was seen e times, less the rows that wait to fill their bucket's batch.
    assert all(num_epochs - seen[row] >= 0 for row in range(num_rows))
    waiting = sum(num_epochs - seen[row] for row in range(num_rows))
    num_still, still_size = (num_rows + 2) // 3, batch_size + 1
    expected = num_still * num_epochs % still_size
    expected += (num_rows - num_still) * num_epochs % batch_size
    assert waiting == expected


def test_with_full_batches_an_epoch_is_a_permutation_and_epochs_differ(tmp_path):
    plan = make_plan(tmp_path, 40, batch_size=4)
    epochs = [rows_of(plan, range(10 * e, 10 * e + 10)) for e in range(3)]
    for rows in epochs:
        assert sorted(rows) == list(range(40))
    assert epochs[0] != epochs[1] != epochs[2]
    assert [plan.num_steps(e) for e in range(3)] == [10, 10, 10]
    assert [plan.epoch_of(step) for step in (0, 9, 10, 29, 30)] == [0, 0, 1, 2, 3]


def test_buckets_mix_within_an_epoch_in_a_new_order_each_time(tmp_path):
    plan = make_plan(tmp_path, 120, batch_size=4, **mixed(120))
    orders = []
    for epoch in range(3):
        steps = range(plan.first_step(epoch), plan.first_step(epoch + 1))
        orders.append([plan.batch(step).bucket.num_frames for step in steps])
        runs = sum(a != b for a, b in zip(orders[-1], orders[-1][1:], strict=False))
        assert runs > 4  # unmixed buckets would change once
    assert orders[0] != orders[1]


def test_the_order_depends_on_the_seed_and_stays_as_it_is(tmp_path):
    plan = make_plan(tmp_path, 10, batch_size=4)
    assert rows_of(plan, range(3)) == [2, 0, 9, 3, 6, 1, 4, 8, 5, 7, 6, 2]
    assert rows_of(make_plan(tmp_path, 10, seed=1), range(3)) != rows_of(plan, range(3))
    assert make_plan(tmp_path, 10).identity == plan.identity
    assert make_plan(tmp_path, 10, seed=1).identity != plan.identity
    assert make_plan(tmp_path, 11).identity != plan.identity


def test_less_data_than_a_batch_is_gathered_over_epochs(tmp_path):
    plan = make_plan(tmp_path, 3, batch_size=7)
    assert [plan.num_steps(epoch) for epoch in range(7)] == [0, 0, 1, 0, 1, 0, 1]
    rows = rows_of(plan, range(6))
    assert Counter(rows) == {0: 14, 1: 14, 2: 14}
    assert all(sorted(rows[i : i + 3]) == [0, 1, 2] for i in range(0, 42, 3))
    assert plan.epoch_of(3 * 10**6 - 1) == 7 * 10**6 - 1


def test_varying_epochs_are_the_same_from_any_starting_point(tmp_path):
    walking = make_plan(tmp_path, 60, keep=0.5, **mixed(60))
    walked = [walking.batch(step).rows.tolist() for step in range(40)]
    for step in (39, 3, 17, 0, 38):
        fresh = make_plan(tmp_path, 60, keep=0.5, **mixed(60))
        assert fresh.batch(step).rows.tolist() == walked[step]
        assert walking.batch(step).rows.tolist() == walked[step]


def test_spares_come_from_the_same_bucket_and_differ_with_the_step(tmp_path):
    plan = make_plan(tmp_path, 90, batch_size=4, **mixed(90))
    seen = {}
    for step in range(40):
        batch = plan.batch(step)
        assert batch.spares.shape == (len(batch.rows), NUM_SPARES)
        assert ((batch.spares % 3 == 0) == (batch.bucket.num_frames == 1)).all()
        for row, spares in zip(batch.rows.tolist(), batch.spares.tolist(), strict=True):
            seen.setdefault(row, set()).add(tuple(spares))
    assert any(len(choices) > 1 for choices in seen.values())


def test_more_ranks_than_clips_in_a_batch_are_refused(tmp_path):
    plan = make_plan(tmp_path, 20, batch_size=4)
    plan.check_parts(lambda bucket: 4)
    with pytest.raises(UsageError, match=r"batch size of 4, too few for 5 data-parallel ranks"):
        plan.check_parts(lambda bucket: 5)


def test_once_takes_every_row_exactly_once(tmp_path):
    manifest = make_manifest(tmp_path, 25, **mixed(25))
    assigner = assign(manifest, buckets({"64px": {1: [1, 4], 17: [1, 7]}}, aspect_ratios=["1:1"]))
    found = once(assigner)
    assert sorted(np.concatenate([batch.rows for batch in found])) == list(range(25))
    assert [len(batch.rows) for batch in found] == [7, 7, 2, 4, 4, 1]
    assert all((np.diff(batch.rows) > 0).all() for batch in found)


def test_a_million_rows_are_planned_in_seconds(tmp_path):
    num_rows = 1_000_000
    strings = PackedStrings(np.full(num_rows, 97, np.uint8), np.arange(num_rows + 1))
    column = np.ones(num_rows)
    table = {"path": strings, "text": strings, "fps": 8 * column, **mixed(num_rows)}
    table |= {"height": 64 * column, "width": 64 * column}
    manifest = from_columns(table, folder=tmp_path, where="here")
    config = buckets({"64px": {1: [1, 64], 17: [0.9, 32]}, "32px": {17: [1, 32]}})
    began = time.process_time()
    plan = Plan(assign(manifest, config), seed=0)
    first = plan.batch(0)
    later = plan.batch(plan.first_step(1) + 5)
    spent = time.process_time() - began
    assert (first.epoch, later.epoch) == (0, 1)
    # About 2 s of processor time on a slow core; ten times as much would be a loop over rows.
    assert spent < 20
