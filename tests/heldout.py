"""The type of the fixture `heldout`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Heldout = tuple[NDArray[np.uint8], NDArray[np.int32]]
"""Images, uint8 [n, height, width, 3], and their classes, int32 [n]."""
