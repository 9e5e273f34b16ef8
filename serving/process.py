"""Settings of a long-running server process: garbage collection, glibc's malloc, and open files."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from contextlib import suppress

from resnet import BadInput

MIN_FILES = 64  # an idle server has 20, those of its libraries included; each connection is one more
# By default Python collects the youngest generation after 700 allocations. With hundreds of active calls that finds
# almost nothing, and it lowered a server's throughput by an eighth.
GC_THRESHOLD, GC_OLDER_THRESHOLD = 10_000, 50
# glibc returns large blocks to the kernel at once, which has to zero the next ones: with requests of 20 MB that lowered
# throughput by a sixth.
RETAINED_BYTES = 2**29
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h


def prepare() -> None:
    """Collect garbage less often, keep freed memory for later requests, and open as many files as the system allows.

    Each connection is an open file. Usually 1024 are allowed, for programs that call `select`, and a process may allow
    itself more: without that, silent connections could keep callers out and new versions from being read.

    Raises:
        BadInput: The system allows too few for a server.
    """
    gc.set_threshold(GC_THRESHOLD, GC_OLDER_THRESHOLD, GC_OLDER_THRESHOLD)
    if glibc := _find_glibc():
        glibc.mallopt(M_TRIM_THRESHOLD, RETAINED_BYTES)
        glibc.mallopt(M_MMAP_THRESHOLD, RETAINED_BYTES)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < MIN_FILES:
        raise BadInput(f"the server may open only {most} files; allow at least {MIN_FILES}, with ulimit -n")
    with suppress(ValueError, OSError):  # macOS refuses its own unlimited number
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def release_memory() -> None:
    """Give freed memory back to the system.

    Loading a model takes more memory than serving it. Kept for requests, what it freed would add up with each version.
    """
    if glibc := _find_glibc():
        glibc.malloc_trim(0)


def _find_glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc: musl has none of its settings."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None
