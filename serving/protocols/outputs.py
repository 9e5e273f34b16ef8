"""Probabilities as responses carry them: the same for every protocol."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from serving.runtimes.base import Probabilities


def find_top(probabilities: Probabilities, count: int) -> NDArray[np.intp]:
    """Return the indices of the most probable classes of each image, [n, count], the most probable first.

    Equal probabilities come in the order of the classes: the sort is stable.
    """
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
