"""The closed forms agree with the laws that they stand for."""

import numpy as np
import pytest

from opensora.arena.motion import Drive, collide, trace, travel, velocities, wall_contacts

LOW, HIGH = np.array([10.0, 12.0]), np.array([50.0, 40.0])
TIMES = np.arange(0, 8, 0.125)


@pytest.mark.parametrize("masses", [(1.0, 1.0), (4.0, 1.0), (81.0, 132.0)])
def test_a_collision_keeps_momentum_and_energy(masses):
    before = (7.0, -3.0)
    after = collide(masses, before)
    assert np.dot(masses, after) == pytest.approx(np.dot(masses, before), rel=1e-12)
    assert np.dot(masses, np.square(after)) == pytest.approx(
        np.dot(masses, np.square(before)), rel=1e-12
    )
    assert after[1] - after[0] == pytest.approx(before[0] - before[1])  # they part as they met


def test_equal_discs_swap_their_speeds():
    assert collide((2.0, 2.0), (5.0, -1.0)) == pytest.approx((-1.0, 5.0))


def test_a_falling_object_gains_speed_evenly():
    drive = Drive(np.array([3.0, 0.0]), np.array([0.0, 10.0]))
    start = np.array([5.0, 6.0])
    assert travel(drive, np.array([2.0]))[0] == pytest.approx([6.0, 20.0])
    assert velocities(drive, start, np.array([2.0]), LOW, HIGH)[0] == pytest.approx([3.0, 20.0])


def test_a_bouncing_object_stays_between_the_walls_at_constant_speed():
    drive = Drive(np.array([31.0, -17.0]), np.zeros(2), reflects=True)
    start = np.array([20.0, 30.0])
    path = trace(drive, start[None], TIMES, LOW, HIGH)[0]
    speed = velocities(drive, start, TIMES, LOW, HIGH)
    assert (path >= LOW - 1e-9).all()
    assert (path <= HIGH + 1e-9).all()
    np.testing.assert_allclose(np.abs(speed), np.broadcast_to([31.0, 17.0], speed.shape))
    # Between two frames without a contact the path is straight.
    hit = np.array([t for t, _ in wall_contacts(drive, start, float(TIMES[-1]), LOW, HIGH)])
    for i in range(len(TIMES) - 1):
        if not ((hit > TIMES[i]) & (hit <= TIMES[i + 1])).any():
            np.testing.assert_allclose(path[i + 1] - path[i], speed[i] * 0.125, atol=1e-9)


def test_contacts_say_when_and_which_wall():
    drive = Drive(np.array([10.0, 0.0]), np.zeros(2), reflects=True)
    contacts = wall_contacts(drive, np.array([40.0, 20.0]), 6.0, LOW, HIGH)
    assert contacts == [(pytest.approx(1.0), "right"), (pytest.approx(5.0), "left")]
    for time, _ in contacts:
        place = trace(drive, np.array([[40.0, 20.0]]), np.array([time]), LOW, HIGH)[0, 0]
        assert min(abs(place[0] - LOW[0]), abs(place[0] - HIGH[0])) < 1e-9


def test_what_does_not_reflect_touches_no_wall():
    assert wall_contacts(Drive(np.ones(2) * 99, np.zeros(2)), LOW, 9.0, LOW, HIGH) == []
