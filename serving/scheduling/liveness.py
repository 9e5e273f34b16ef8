"""Liveness: whether what has work also does some, look by look."""

from __future__ import annotations

from typing import NamedTuple


class Liveness(NamedTuple):
    """What was seen of something that works.

    Attributes:
        done: How much it had done at the last look.
        silent: Seconds for which it has had work, and has done none.
    """

    done: int = -1
    silent: float = 0.0

    def look(self, done: int, has_work: bool, seconds: float) -> Liveness:
        """Return what is seen now.

        Args:
            done: How much it has done.
            has_work: Whether there is more to do.
            seconds: Time since the last look, but no more than is usual: while a process is stopped, nobody works.
        """
        return Liveness(done, self.silent + seconds if has_work and done == self.done else 0.0)
