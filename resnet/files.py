"""Files that a user names."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from resnet import BadInput


def read_file(path: Path) -> bytes:
    """Return the content of a regular file; others, such as pipes, may never end or never begin.

    Raises:
        BadInput: It cannot be read, or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would wait
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode):
                return file.read()
    except IsADirectoryError:
        mode = stat.S_IFDIR
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})") from None
    except ValueError:  # a null byte
        raise BadInput(f"{str(path)!r} is no path") from None
    raise BadInput(f"{path} is a folder; name a file" if stat.S_ISDIR(mode) else f"{path} is not a regular file")
