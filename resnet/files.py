"""Regular files: opened without waiting for a pipe's other end, which may never come."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resnet import BadInput

FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
IRREGULAR = (errno.ELOOP, errno.ENXIO, errno.ENODEV)  # what opening a link, a socket or a missing device gives


@contextmanager
def open_regular(path: Path, follow: bool = True) -> Iterator[io.BufferedReader]:
    """Open a regular file to read.

    Args:
        path: The file.
        follow: Follow a link; False takes it for what it is, no regular file.

    Raises:
        OSError: It cannot be opened, or is a folder, a pipe or a device.
    """
    try:
        descriptor = os.open(path, FLAGS | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        if error.errno in IRREGULAR:
            raise OSError(errno.EINVAL, "not a regular file", str(path)) from None
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_file(path: Path) -> bytes:
    """Return the content of a regular file that a user names.

    Raises:
        BadInput: It cannot be read, or is no regular file.
    """
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        if error.errno == errno.EISDIR:
            raise BadInput(f"{path} is a folder; name a file") from None
        raise BadInput(f"{path} cannot be read ({error.strerror})") from None
    except ValueError:  # a null byte
        raise BadInput(f"{str(path)!r} is no path") from None
