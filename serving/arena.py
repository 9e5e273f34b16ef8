"""Memory that a front end shares with the engine process: pixels and probabilities cross between them without a copy.

It is a file without a name: what is left of it ends with the last process that has it open, however that ends.
"""

from __future__ import annotations

import math
import mmap
import os
from bisect import bisect_left

import numpy as np

from serving.engine import Images, Probabilities

ALIGNMENT = 64  # bytes, of a cache line: two processes never write into the same one


class Arena:
    """Memory from which pieces are taken, and given back; one thread at a time may do so."""

    def __init__(self, size: int) -> None:
        """Begin with all of it free; the system provides a page when it is first written to.

        Args:
            size: In bytes.
        """
        self.size = size = _round_up(size)
        self.file = os.memfd_create("resnet", os.MFD_CLOEXEC)
        """A descriptor, for the other process."""
        os.ftruncate(self.file, size)
        self.memory = mmap.mmap(self.file, size)
        self._free = [(0, size)]  # offsets and sizes, in order, no two of them adjacent

    def take(self, size: int) -> int | None:
        """Return the offset of so many bytes, or None where no piece is large enough.

        It is the lowest one: what was in use lately is in use again.
        """
        size = _round_up(size)
        for at, (offset, room) in enumerate(self._free):
            if room > size:
                self._free[at] = (offset + size, room - size)
                return offset
            if room == size:
                del self._free[at]
                return offset
        return None

    def give_back(self, offset: int, size: int) -> None:
        """Free what was taken."""
        size = _round_up(size)
        at = bisect_left(self._free, (offset,))
        if at < len(self._free) and offset + size == self._free[at][0]:
            size += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == offset:
            at -= 1
            before = self._free.pop(at)
            offset, size = before[0], before[1] + size
        self._free.insert(at, (offset, size))

    def close(self) -> None:
        """Let go of the file; the memory stays as long as there are slots in it."""
        os.close(self.file)


class Slot:
    """Where one request lies in the memory: a flag, its pixels, and what becomes of them.

    Attributes:
        pixels: uint8 [images, height, width, 3].
        probabilities: float32 [images, classes].
    """

    def __init__(
        self, memory: mmap.mmap, offset: int, images: int, image_shape: tuple[int, int, int], classes: int
    ) -> None:
        """Name the parts of what begins at `offset` and has the size that `measure` returns.

        Raises:
            TypeError: It goes beyond the end of the memory.
        """
        self._memory, self._offset = memory, offset
        pixels, probabilities = _lay_out(images, image_shape)
        self.pixels: Images = np.ndarray((images, *image_shape), np.uint8, memory, offset + pixels)
        self.probabilities: Probabilities = np.ndarray((images, classes), np.float32, memory, offset + probabilities)

    @staticmethod
    def measure(images: int, image_shape: tuple[int, int, int], classes: int) -> int:
        """Return how many bytes a request needs."""
        _, probabilities = _lay_out(images, image_shape)
        return probabilities + images * classes * np.dtype(np.float32).itemsize

    @property
    def wanted(self) -> bool:
        """Whether the caller still waits."""
        return not self._memory[self._offset]

    @wanted.setter
    def wanted(self, wanted: bool) -> None:
        self._memory[self._offset] = not wanted


def _lay_out(images: int, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Return where pixels and probabilities begin."""
    return ALIGNMENT, ALIGNMENT + _round_up(images * math.prod(image_shape))


def _round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
