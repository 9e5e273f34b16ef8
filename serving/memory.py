"""How the process of a server treats its memory: as one that does the same for days, not as a program that ends."""

from __future__ import annotations

import ctypes
import gc
import sys

# Python looks for garbage among the youngest objects after so many new ones, by default 700: with hundreds of calls
# under way that is in vain, and took an eighth of the calls that a server could bear.
YOUNGEST, OLDER = 10_000, 50
# glibc gives large blocks back at once, and the kernel has to clear the next: a server could bear a sixth less of
# requests of 20 MB.
KEPT_BYTES = 2**29
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def prepare() -> None:
    """Look for garbage more rarely, and keep what is freed for what comes."""
    gc.set_threshold(YOUNGEST, OLDER, OLDER)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
            libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
