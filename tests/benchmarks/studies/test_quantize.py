"""What the study counts, against answers counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.studies.quantize import Row, compare
from export.statistics import bound_drop


def test_losses_are_counted_against_both_originals() -> None:
    """That of the same run, and that of the first."""
    targets = np.array([0, 1, 2, 0], np.int32)
    first, exact, row = (
        Row("run", "fp32", np.array(classes), {}) for classes in ([0, 1, 2, 0], [0, 0, 2, 1], [0, 1, 0, 1])
    )
    figures = compare(row, exact, first, targets)
    assert (figures["accuracy"], figures["lost"], figures["gained"]) == (0.5, 1, 1)
    assert figures["bound"] == pytest.approx(100 * bound_drop(1, 1, 4))
    assert figures["bound_of_first"] == pytest.approx(100 * bound_drop(2, 0, 4))
