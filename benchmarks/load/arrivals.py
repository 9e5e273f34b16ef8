"""When requests are sent, decided ahead: a load that waits for answers would spare a slow server."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]
"""Seconds from the start, ascending."""


def poisson(rate: float, seconds: float, seed: int) -> Times:
    """Return the arrivals of many callers who know nothing of each other: `rate` a second on average."""
    random = np.random.default_rng(seed)
    # Given how many there are, they are spread evenly.
    return np.sort(random.uniform(0, seconds, random.poisson(rate * seconds)))


def constant(rate: float, seconds: float, seed: int) -> Times:  # noqa: ARG001  # as `poisson`
    """Return arrivals at even distances."""
    return np.arange(round(rate * seconds)) / rate


ARRIVALS: dict[str, Callable[[float, float, int], Times]] = {"poisson": poisson, "constant": constant}
