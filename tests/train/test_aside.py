"""Ranks that share work between two steps all leave it when one cannot go on, and train on."""

import math

import pytest
from train_support import ALONE

from opensora.errors import DataError, StorageError
from opensora.evaluate.suite import Row, write
from opensora.evaluate.suite import shared as dealt
from opensora.train import aside
from tests.evaluate.vbench.ranks import on_ranks


def failing_at(when, ranks=(1,), error=StorageError):
    """Three meetings, before one of which some ranks fail."""

    def work(output, place):
        for moment in range(4):
            if moment == when and place.rank in ranks:
                raise error(f"the disk of moment {moment} is full")
            if moment < 3:
                found = dealt(place, 5, lambda index: index * index, lambda *_: None)
        return found

    return work


def test_shared_work_is_dealt_and_found_by_all(tmp_path):
    found = on_ranks(3, lambda place: aside.shared(failing_at(None), tmp_path, place))
    assert found == [[0, 1, 4, 9, 16]] * 3


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("when", [0, 2, 3])
def test_wherever_a_rank_fails_all_leave_and_meet_again(when, ranks, tmp_path, caplog):
    def steps(place):
        first = aside.shared(failing_at(when, ranks), tmp_path, place)
        return first, place.gather_objects(place.rank)

    assert on_ranks(3, steps) == [(None, [0, 1, 2])] * 3
    (told,) = [r.getMessage() for r in caplog.records]
    assert f"the disk of moment {when} is full" in told and "training goes on" in told


def test_one_rank_alone_goes_on_too(tmp_path, caplog):
    assert aside.shared(failing_at(1, (0,), DataError), tmp_path, ALONE) is None
    assert "moment 1 is full; training goes on without it" in caplog.text


def test_where_calls_are_collective_all_do_all_and_the_first_ones_files_are_kept(tmp_path):
    def work(output, place):
        assert place.world_size == 1
        (output / "file").write_text("made")
        return output == tmp_path

    assert on_ranks(2, lambda place: aside.by_all(work, tmp_path, place)) == [True, False]
    with pytest.raises(StorageError):
        aside.by_all(failing_at(0, (0,)), tmp_path, ALONE)


@pytest.mark.parametrize("way", [aside.shared, aside.by_all])
def test_what_is_no_number_is_told_once_and_training_goes_on(way, tmp_path, caplog):
    """As a suite finds it, which judges a model that has diverged."""

    def work(output, place):
        values = dealt(place, 3, lambda index: math.nan, lambda *_: None)
        rows = [Row("all", f"clip {i}", {"loss": value}) for i, value in enumerate(values)]
        return write(output, rows, settings={}) if place.is_main else {}

    def steps(place):
        return way(work, tmp_path, place), place.gather_objects(place.rank)

    assert on_ranks(2, steps) == [(None, [0, 1])] * 2
    (told,) = [r.getMessage() for r in caplog.records]
    assert "loss of group 'all'" in told and told.endswith("training goes on without it")
    assert not list(tmp_path.iterdir())
