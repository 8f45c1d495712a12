"""Which samples a step has does not depend on ranks, nor on how many of them share a clip."""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opensora import config as configs
from opensora.data.mixing import MixedPlan
from opensora.data.plan import Batch, Plan
from opensora.data.sources import tokens
from opensora.data.synthetic import SyntheticAssigner, SyntheticSourceConfig
from opensora.dist.mesh import Layout
from opensora.engine.sequence import SequenceParallel
from opensora.errors import UsageError

STRIDE, PATCH = (4, 8, 8), (1, 2, 2)
SHAPES = [("64px", 1), ("64px", 5), ("64px", 17), ("128px", 5), ("128px", 17), ("128px", 33)]


@st.composite
def plans(draw):
    """A plan over random buckets: batch sizes of their own, or a budget of tokens."""
    chosen = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4, unique=True))
    by_budget = draw(st.booleans())
    table: dict = {}
    for name, length in chosen:
        size = None if by_budget else draw(st.integers(1, 20))
        table.setdefault(name, {})[length] = {"batch_size": size}
    buckets = {"resolutions": table, "aspect_ratios": ["1:1", "16:9"]}
    if by_budget:
        buckets["token_budget"] = draw(st.integers(800, 8000))
    tree = {"kind": "synthetic", "buckets": buckets, "num_samples": draw(st.integers(1, 300))}
    config = configs.validate(SyntheticSourceConfig, tree, where="test")
    assigner = SyntheticAssigner(config, stride=STRIDE, patch=PATCH)
    seed = draw(st.integers(0, 1000))
    if draw(st.booleans()):
        return MixedPlan(assigner, seed=seed, cost=tokens)
    return Plan(assigner, seed=seed)


@st.composite
def layouts(draw):
    """Up to 32 ranks, of which some may share a clip where it is long."""
    power = partial(st.sampled_from, [1, 2, 4])
    return Layout(
        dp_replicate=draw(power()),
        dp_shard=draw(st.sampled_from([1, 2])),
        ring=draw(st.sampled_from([1, 2])),
        ulysses=draw(power()),
        tp=draw(st.sampled_from([1, 1, 2])),
    ), draw(st.sampled_from([None, 8, 32, 100, 400]))


def read_by(plan, step, layout, max_tokens) -> dict[int, list[tuple[int, int]]]:
    """rank -> (sample id, by how many ranks it is shared), as the trainer's shares have it."""
    found = {}
    for rank in range(layout.world_size):
        mesh = SimpleNamespace(layout=layout)
        shared = SequenceParallel(mesh, max_tokens)  # type: ignore[arg-type]

        def part(bucket, rank=rank, shared=shared):
            return layout.part(rank, shared.degree(bucket.num_tokens))

        plan.check_parts(lambda bucket, part=part: part(bucket)[1])
        mine = plan.local(step, part)
        pieces = [mine] if isinstance(mine, Batch) else mine.pieces
        found[rank] = [
            (row, shared.degree(piece.bucket.num_tokens) * layout.tp)
            for piece in pieces
            for row in piece.rows.tolist()
        ]
    return found


@settings(max_examples=150, deadline=None)
@given(plan=plans(), placed=layouts(), steps=st.lists(st.integers(0, 200), min_size=1, max_size=4))
def test_each_sample_is_read_by_exactly_the_ranks_that_share_it(plan, placed, steps):
    layout, max_tokens = placed
    for step in steps:
        try:
            found = read_by(plan, step, layout, max_tokens)
        except UsageError:  # a batch with fewer clips than ranks is refused before the run
            assume(False)
        readers: dict[int, list[int]] = defaultdict(list)
        together: dict[int, int] = {}
        for rank, samples in found.items():
            for row, width in samples:
                readers[row].append(rank)
                together[row] = width
        whole = plan.batch(step).rows.tolist()
        assert set(readers) == set(whole)
        for row, ranks in readers.items():
            width, times = together[row], whole.count(row)  # twice where the data end in a step
            assert len(ranks) == width * times
            groups = {rank // width for rank in ranks}
            for group in groups:  # whole groups of neighbours
                members = [rank for rank in ranks if rank // width == group]
                assert set(members) == set(range(group * width, (group + 1) * width))


@settings(max_examples=60, deadline=None)
@given(plan=plans(), placed=layouts(), step=st.integers(0, 100))
def test_unmixed_ranks_have_the_step_in_one_order(plan, placed, step):
    assume(isinstance(plan, Plan))
    layout, max_tokens = placed
    try:
        found = read_by(plan, step, layout, max_tokens)
    except UsageError:
        assume(False)
    width = next(iter(found[0]))[1]
    order = [row for rank in range(0, layout.world_size, width) for row, _ in found[rank]]
    assert order == plan.batch(step).rows.tolist()


@settings(max_examples=40, deadline=None)
@given(plan=plans())
def test_an_epoch_loses_and_repeats_nothing(plan):
    assume(isinstance(plan, MixedPlan) or plan.num_steps(0) > 0)
    num_rows = int(plan._assign(0).counts.sum())
    met: dict[int, int] = defaultdict(int)
    step = 0
    if isinstance(plan, MixedPlan):
        while True:
            batch = plan.batch(step)
            own = batch.rows[batch.epochs == 0].tolist()
            for row in own:
                met[row] += 1
            if len(own) < len(batch.rows) or batch.epochs[0] > 0:
                break
            step += 1
        assert met == dict.fromkeys(range(num_rows), 1)
        return
    for step in range(plan.num_steps(0)):
        for row in plan.batch(step).rows.tolist():
            met[row] += 1
    assert set(met.values()) == {1}
    waiting = sum(
        int(count) % bucket.batch_size
        for count, bucket in zip(plan._assign(0).counts, plan.buckets, strict=True)
    )
    assert len(met) == num_rows - waiting


def test_a_rank_that_reads_by_its_own_number_would_be_seen(monkeypatch):
    """The property fails on a planted bug: the sequence degree is forgotten."""
    monkeypatch.setattr(Layout, "part", lambda self, rank, degree: (rank, self.world_size))
    with pytest.raises((AssertionError, ExceptionGroup)):
        test_each_sample_is_read_by_exactly_the_ranks_that_share_it()
