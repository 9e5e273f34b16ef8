"""Which classes an answer names."""

from __future__ import annotations

import numpy as np
import pytest

from serving.protocols.outputs import find_top


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [[1], [0], [3]]), (2, [[1, 3], [0, 1], [3, 2]]), (9, [[1, 3, 0, 2], [0, 1, 2, 3], [3, 2, 1, 0]])],
)
def test_the_most_probable_classes_come_first(count: int, expected: list[list[int]]) -> None:
    """Of each image by itself, all there are if more are asked for."""
    probabilities = np.float32([[0.1, 0.5, 0.1, 0.3], [0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]])
    assert find_top(probabilities, count).tolist() == expected


def test_equal_probabilities_come_in_the_order_of_the_classes() -> None:
    """However many: a quick sort would keep the order of a few only."""
    probabilities = np.zeros((1, 1000), np.float32)
    probabilities[0, ::7] = 0.5
    first, rest = list(range(0, 1000, 7)), [index for index in range(1000) if index % 7]
    assert find_top(probabilities, 1000).tolist() == [first + rest]
