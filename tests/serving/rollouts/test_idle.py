"""When a shadow may compute."""

from __future__ import annotations

import numpy as np
import pytest

from serving.rollouts.idle import FIRST_PAUSE, LAST_PAUSE, LEFT_ALONE, PART, RESERVE, IdleCapacity

BATCH = 0.003  # seconds


def run(load: float, reserve: float = 0.0, seconds: float = 100.0) -> float:
    """Return the share of the time that a shadow computes that always has work, beside a random load."""
    random, capacity = np.random.default_rng(0), IdleCapacity(reserve)
    now = computed = 0.0
    while now < seconds:
        is_idle = random.random() >= load
        if capacity.may_compute(is_idle, now):
            assert is_idle
            capacity.record(now, now + BATCH)
            computed += BATCH
            now += BATCH
        now += capacity.pause
    return computed / seconds


@pytest.mark.parametrize("load", [0.0, 0.2, 0.5, 0.8, 0.95])
def test_a_shadow_takes_a_part_of_the_idle_time(load: float) -> None:
    """The less is idle, the less it takes."""
    most = PART * (1 - load)
    assert 0.5 * most < run(load) < 1.1 * most


def test_a_busy_server_is_left_alone() -> None:
    """However long; by a rollout, which has to find something out, only if it is never idle."""
    assert run(1.0) == run(1.0, RESERVE) == 0
    assert run(1 - RESERVE / 2, RESERVE) < 0.5 * run(1 - RESERVE / 2)
    assert run(0.5, RESERVE) < run(0.5)


def test_a_busy_server_is_looked_at_less_often() -> None:
    """Until it is idle; least of all while nothing may be computed anyway."""
    for reserve, last in ((0.0, LAST_PAUSE), (RESERVE, LEFT_ALONE)):
        capacity = IdleCapacity(reserve)
        pauses = []
        for is_idle in (*[False] * 7, True):
            capacity.may_compute(is_idle, 0)
            pauses.append(capacity.pause)
        assert pauses == [*(min(FIRST_PAUSE * 2**power, last) for power in range(1, 8)), FIRST_PAUSE]
