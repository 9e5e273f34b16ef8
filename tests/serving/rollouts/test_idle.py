"""When a shadow may compute."""

from __future__ import annotations

import numpy as np
import pytest

from serving.rollouts.idle import PART, IdleCapacity

LOOK, BATCH = 0.001, 0.003  # seconds


def run(load: float, seconds: float = 60.0) -> float:
    """Return the share of the time that a shadow computes that always has work, beside a random load."""
    random, capacity = np.random.default_rng(0), IdleCapacity()
    now = computed = 0.0
    while now < seconds:
        is_idle = random.random() >= load
        if capacity.may_compute(is_idle, now):
            assert is_idle
            capacity.record(now, now + BATCH)
            computed += BATCH
            now += BATCH
        now += LOOK
    return computed / seconds


@pytest.mark.parametrize("load", [0.0, 0.2, 0.5, 0.8, 0.95])
def test_a_shadow_takes_a_part_of_the_idle_time(load: float) -> None:
    """The less is idle, the less it takes."""
    assert run(load) == pytest.approx(PART * (1 - load), rel=0.25)


def test_a_busy_server_is_left_alone() -> None:
    """However long."""
    assert run(1.0) == 0
