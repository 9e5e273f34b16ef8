"""Work beside what is measured or checked, on a thread of its own."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Self


class Background(ABC):
    """Runs `run` on a thread during a `with` block."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        """Set at the end of the block, which then waits for `run` to return."""
        self._thread = threading.Thread(target=self.run, name=type(self).__name__)

    @abstractmethod
    def run(self) -> None:
        """Work until `stopped` is set."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._thread.join()
