"""Placing is addressed, bounded, and never lets things meet."""

import numpy as np
import pytest

from opensora.arena.motion import Drive, trace
from opensora.arena.place import GAP, MARGIN, TURN, Body, Dice, scatter

STILL = Drive(np.zeros(2), np.zeros(2))
TIMES = np.arange(17) / 8


def body(reach=10.0, velocity=(0.0, 0.0), *, reflects=False):
    return Body(np.full(4, reach), Drive(np.array(velocity), np.zeros(2), reflects=reflects))


def test_dice_depend_on_their_address_only():
    first, again, other = Dice(7), Dice(7), Dice(8)
    values = [first.uniform(0, 1) for _ in range(5)]
    assert values == [again.uniform(0, 1) for _ in range(5)]
    assert values != [other.uniform(0, 1) for _ in range(5)]


def test_the_stream_of_an_address_is_the_same_on_every_machine():
    # Philox 4x64-10 of Salmon et al., 2011, as numpy has it; datasets depend on these numbers.
    assert Dice(1).uniform(0, 1) == pytest.approx(0.303568034307, abs=1e-12)
    assert Dice(2).uniform(0, 1) == pytest.approx(0.488915504296, abs=1e-12)


def test_weights_are_kept():
    dice = Dice(3)
    drawn = [dice.pick({"a": 3.0, "b": 1.0, "c": 0.0}) for _ in range(4000)]
    # Three standard deviations of a binomial share with p = 0.75.
    assert drawn.count("a") / 4000 == pytest.approx(0.75, abs=3 * np.sqrt(0.75 * 0.25 / 4000))
    assert "c" not in drawn


def test_placed_bodies_stay_inside_and_apart():
    bodies = [body(9, (12.0, 0.0)), body(9, (0.0, -12.0)), body(8)]
    placed = 0
    for address in range(30):
        starts = scatter(Dice(address), bodies, TIMES, (64, 64), unit=1.0)
        if starts is None:
            continue
        placed += 1
        low_high = [b.room((64, 64), MARGIN) for b in bodies]
        paths = [
            trace(b.drive, s[None], TIMES, *lh)[0]
            for b, s, lh in zip(bodies, starts, low_high, strict=True)
        ]
        for path, (low, high) in zip(paths, low_high, strict=True):
            assert (path >= low - 1e-9).all()
            assert (path <= high + 1e-9).all()
        for i in range(3):
            for j in range(i):
                sides = bodies[i].reach[0] + bodies[j].reach[0]
                apart = np.abs(paths[i] - paths[j]).max(1) - sides
                assert apart.min() >= GAP - 1e-9
    assert placed >= 20


def test_a_bouncing_body_is_seen_to_turn():
    bouncing = body(10, (12.0, 9.0), reflects=True)
    low, high = bouncing.room((64, 64), MARGIN)
    for address in range(20):
        starts = scatter(Dice(address), [bouncing], TIMES, (64, 64), unit=1.0)
        assert starts is not None
        path = trace(bouncing.drive, starts, TIMES, low, high)[0]
        turns = [
            way[1:-1].max() - max(way[0], way[-1])
            for axis in (0, 1)
            for way in (path[:, axis], -path[:, axis])
        ]
        # The turn itself may fall between two frames, 12 px/s / 8 fps apart.
        assert max(turns) >= TURN - 1.5


def test_what_cannot_fit_is_reported():
    assert scatter(Dice(0), [body(20), body(20)], TIMES, (64, 64), unit=1.0) is None
