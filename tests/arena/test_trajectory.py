"""Motions are recognised from places, and only the motion that is meant."""

import numpy as np
import pytest

from opensora.arena import trajectory
from opensora.arena.reading import Reading, Track

FPS = 8.0
T = np.arange(17) / FPS


def track(path, *, seen=None, whole=None, radius=9.0):
    path = np.asarray(path, float)
    seen = np.ones(len(path), bool) if seen is None else seen
    whole = seen if whole is None else whole
    return Track(
        seen=seen,
        whole=whole,
        positions=np.where(seen[:, None], path, np.nan),
        areas=np.where(seen, np.pi * radius**2, np.nan),
        colours=np.where(seen, 0, -1),
        overlaps=np.where(seen[:, None], [1.0, 0.8, 0.7], np.nan),
    )


def reading(*tracks, bar=None, size=64):
    frames = len(tracks[0].seen)
    bars = np.full((frames, 2), -1) if bar is None else np.tile(bar, (frames, 1))
    return Reading(size, size, tracks, np.full(frames, len(tracks)), np.zeros(frames, int), bars)


def straight(vx, vy, start=(32.0, 32.0)):
    return np.stack([start[0] + vx * T, start[1] + vy * T], 1)


def heading(path, **kwargs):
    one = track(path, **kwargs)
    return trajectory.heading(one, reading(one), FPS)


@pytest.mark.parametrize(
    ("velocity", "expected"),
    [
        ((-5, 0), "left"),
        ((5, 0), "right"),
        ((0, -5), "up"),
        ((0, 5), "down"),
        ((0, 0), "still"),
        ((0.5, 0.3), "still"),
        ((5, 2), "right"),
        ((5, 3), "unclear"),
        ((4, 4), "unclear"),
    ],
)
def test_a_heading_is_the_axis_that_dominates(velocity, expected):
    assert heading(straight(*velocity)) == expected


def test_jumping_about_is_no_heading():
    chance = np.random.default_rng(0)
    path = straight(8, 0, (24, 32))
    headings = [heading(path[chance.permutation(17)]) for _ in range(200)]
    # A shuffle of 17 places is nearly never in order; none may pass as motion.
    assert set(headings) == {"unclear"}


def test_wandering_in_place_is_not_standing_still():
    circle = np.stack([32 + 6 * np.cos(5 * T), 32 + 6 * np.sin(5 * T)], 1)
    assert heading(circle) == "unclear"


def test_a_jitter_of_a_pixel_does_not_hide_a_heading():
    chance = np.random.default_rng(0)
    assert heading(straight(5, 0) + chance.normal(0, 0.6, (17, 2))) == "right"


def test_a_flash_has_no_heading():
    seen = np.arange(17) < 8
    assert heading(straight(9, 0), seen=seen) == "unclear"


def test_headings_mean_the_same_at_twice_the_size():
    one = track(straight(10, 0, (40, 60)), radius=18)
    assert trajectory.heading(one, reading(one, size=128), FPS) == "right"
    slow = track(straight(3, 0, (40, 60)), radius=18)
    assert trajectory.heading(slow, reading(slow, size=128), FPS) == "still"


def fall(gravity=10.0, drift=0.0, rise=0.0):
    return np.stack([20 + drift * T, 15 - rise * T + 0.5 * gravity * T**2], 1)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (fall(), True),
        (fall(drift=4), True),
        (fall()[::-1], False),
        (straight(0, 10, (20, 15)), False),
        (fall(gravity=2), False),
        (fall(gravity=-10), False),
        (fall(rise=20), False),
    ],
)
def test_falling_is_dropping_faster_and_faster_from_rest(path, expected):
    one = track(path)
    assert trajectory.falls(one, reading(one), FPS) is expected


def bounce(speed=24.0, wall=54.0, start=30.0):
    x = start + speed * T
    return np.stack([np.where(x > wall, 2 * wall - x, x), np.full(17, 30.0)], 1)


def test_bouncing_is_turning_back_at_a_wall():
    chance = np.random.default_rng(0)

    def bounces(path):
        one = track(path)
        return trajectory.bounces(one, reading(one), FPS)

    assert bounces(bounce())
    assert not bounces(bounce(wall=40.0))  # turns back in mid air
    assert not bounces(straight(10, 0, (20, 30)))  # never turns
    assert not bounces(bounce()[chance.permutation(17)])


def collision(gap=0.0, parts=True):
    x1 = 14 + 8 * T
    x2 = 50 - 8 * T
    moment = (36 - 18 - gap) / 16
    after = (T - moment).clip(0) * 16 * parts
    first = np.stack([x1 - after, np.full(17, 30.0)], 1)
    second = np.stack([x2 + after, np.full(17, 30.0)], 1)
    return track(first), track(second)


def test_colliding_is_meeting_touching_and_parting():
    first, second = collision()
    assert trajectory.collides(first, second, reading(first, second))
    first, second = collision(gap=8)
    assert not trajectory.collides(first, second, reading(first, second))
    first, second = collision(parts=False)  # they pass through each other
    assert not trajectory.collides(first, second, reading(first, second))
    chance = np.random.default_rng(0)
    first, second = (track(t.positions[chance.permutation(17)]) for t in collision())
    assert not trajectory.collides(first, second, reading(first, second))


def test_an_elastic_exchange_keeps_momentum_and_energy_and_a_sticky_one_does_not():
    first, second = collision()
    momentum, energy = trajectory.exchange(first, second, reading(first, second), FPS) or (9, 9)
    assert momentum < 0.01
    # Velocities swap sign exactly; frames next to the touch are whole on one side of it.
    assert energy < 0.1
    stuck = first.positions.copy()
    stuck[9:] = stuck[9]
    held = track(stuck), second
    changes = trajectory.exchange(*held, reading(*held), FPS)
    assert changes is not None
    assert changes[0] > 0.3
    assert changes[1] > 0.3


def hidden_pass(jump=0.0):
    x = 12 + 20 * T
    x[T > 1] += jump
    seen = (x < 27) | (x > 37)
    one = track(np.stack([x, np.full(17, 30.0)], 1), seen=seen, whole=(x < 18) | (x > 46))
    return one, reading(one, bar=(22, 42))


def test_reappearing_where_the_motion_leads():
    right, error = trajectory.reappears(*hidden_pass(), FPS)
    assert right
    assert error == pytest.approx(0, abs=1e-6)
    wrong, error = trajectory.reappears(*hidden_pass(jump=12), FPS)
    assert not wrong
    assert error == pytest.approx(12, abs=1e-6)


def test_what_never_comes_out_does_not_reappear():
    one, seen_by = hidden_pass()
    lost = track(one.positions, seen=one.seen & (T < 1), whole=one.whole & (T < 1))
    assert trajectory.reappears(lost, reading(lost, bar=(22, 42)), FPS) == (False, None)
    assert trajectory.reappears(one, reading(one), FPS) == (False, None)  # there is no bar
    assert one.hidden > 0
    assert trajectory.heading(one, seen_by, FPS) == "right"
