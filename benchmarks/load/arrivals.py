"""Arrival times of an open loop, drawn in advance: a load that waits for responses would spare a slow server."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]
"""Seconds from the start, ascending."""


def poisson(rate: float, seconds: float, seed: int) -> Times:
    """Return the arrivals of many independent clients, `rate` a second on average."""
    random = np.random.default_rng(seed)
    # Given their number, the arrivals of a Poisson process are distributed uniformly.
    return np.sort(random.uniform(0, seconds, random.poisson(rate * seconds)))


def constant(rate: float, seconds: float, seed: int) -> Times:  # noqa: ARG001  # the signature of `poisson`
    """Return evenly spaced arrivals."""
    return np.arange(round(rate * seconds)) / rate


ARRIVALS: dict[str, Callable[[float, float, int], Times]] = {"poisson": poisson, "constant": constant}
