"""Shared memory is handed out in pieces that never overlap, and all of it comes back."""

from __future__ import annotations

import mmap
import os
import random

import numpy as np
import pytest

from serving.arena import ALIGNMENT, Arena, Slot


def test_pieces_never_overlap_and_come_back_whole() -> None:
    """Whatever the order in which pieces are taken and given back; what does not fit is None."""
    random.seed(0)
    arena = Arena(64 * ALIGNMENT)
    owners = [0] * 64
    taken: list[tuple[int, int]] = []
    refused = 0
    for _ in range(5000):
        if taken and random.random() < 0.5:
            offset, size = taken.pop(random.randrange(len(taken)))
            arena.give_back(offset, size)
            change = -1
        else:
            size = random.randint(1, 12 * ALIGNMENT)
            found = arena.take(size)
            if found is None:
                refused += 1
                run = -(-size // ALIGNMENT) * "0"
                assert run not in "".join(map(str, owners)), "there was room"
                continue
            offset, change = found, 1
            taken.append((offset, size))
        assert offset % ALIGNMENT == 0
        for at in range(offset // ALIGNMENT, -(-(offset + size) // ALIGNMENT)):
            owners[at] += change
            assert owners[at] in (0, 1)
    assert refused
    for offset, size in taken:
        arena.give_back(offset, size)
    assert arena.take(arena.size) == 0


def test_both_processes_see_a_slot() -> None:
    """Pixels and whether the caller waits on the one side, probabilities on the other."""
    arena = Arena(mmap.PAGESIZE)
    theirs = mmap.mmap(os.dup(arena.file), 0)
    shape = (3, 5, 3)
    size = Slot.measure(2, shape, 10)
    assert arena.take(100) == 0
    offset = arena.take(size)
    assert offset
    ours, other = Slot(arena.memory, offset, 2, shape, 10), Slot(theirs, offset, 2, shape, 10)
    ours.wanted = True
    ours.pixels[:] = np.arange(90).reshape(2, 3, 5, 3)
    assert other.wanted
    np.testing.assert_array_equal(other.pixels.ravel(), np.arange(90))
    other.probabilities[:] = 0.1
    ours.wanted = False
    assert not other.wanted
    np.testing.assert_array_equal(ours.probabilities, np.full((2, 10), 0.1, np.float32))
    assert arena.memory[offset + size :] == bytes(arena.size - offset - size), "nothing is written beyond it"
    with pytest.raises(TypeError):
        Slot(theirs, arena.size - 64, 1, shape, 10)
