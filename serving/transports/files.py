"""Files that may be renewed while the server runs: certificates and tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from resnet import BadInput

T = TypeVar("T")

log = logging.getLogger(__name__)


class FollowedFiles(Generic[T]):
    """What some files contain, as of the last `refresh` at which they could be used.

    Attributes:
        content: As it was read.
    """

    def __init__(self, what: str, paths: Sequence[Path], read: Callable[[], T]) -> None:
        """Read the files.

        Args:
            what: What they are, for the log.
            paths: The files.
            read: Returns their content; raises `BadInput` if it cannot be used.

        Raises:
            BadInput: They cannot be used.
        """
        self._what, self._paths, self._read = what, paths, read
        self._seen = self._stamp()  # before they are read: a later change is seen
        self.content = read()

    def refresh(self) -> None:
        """Read the files again if they have changed; if they cannot be used, log it once and keep the content."""
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self.content = self._read()
        except BadInput as error:
            log.error("%s could not be renewed, the old one stays: %s", self._what, error)
        else:
            log.info("%s was renewed", self._what)

    def _stamp(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
