"""Retries: which errors a client retries, how often, and after which pause."""

from __future__ import annotations

import random
import time

from serving.errors import DeadlineExceeded, Overloaded, ServingError, Unavailable

MAX_RETRIES = 4
MAX_TIMEOUT_SECONDS = 1e9  # a little more, and gRPC takes it for the past
FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.1, 1.0


class Retries:
    """The retries of one request, or of one stream's calls."""

    def __init__(self, limit: int) -> None:
        """Allow `limit` retries in a row, 0 to 4.

        Raises:
            ValueError: The limit is out of range.
        """
        if limit not in range(MAX_RETRIES + 1):
            raise ValueError(f"retries must be 0 to {MAX_RETRIES}, not {limit}")
        self._limit, self._count = limit, 0

    def reset(self) -> None:
        """Count from 0 again, after a success."""
        self._count = 0

    def find_pause(self, error: ServingError) -> float:
        """Return the seconds until the next attempt: the server's hint if it gave one, else an exponential backoff.

        Raises:
            ServingError: `error` itself, if a retry would not help or there were too many.
        """
        if not isinstance(error, Unavailable | Overloaded) or self._count >= self._limit:
            raise error
        self._count += 1
        if isinstance(error, Overloaded) and error.retry_ms:
            return error.retry_ms / 1000
        backoff = min(FIRST_BACKOFF_SECONDS * 2.0 ** (self._count - 1), MAX_BACKOFF_SECONDS)
        return random.uniform(0.8, 1.2) * backoff


class Patience:
    """How long a client waits: for all answers together, or for each."""

    def __init__(self, timeout: float | None, each: bool = False) -> None:
        """Begin to wait.

        Args:
            timeout: In seconds; None waits forever.
            each: The timeout is for each answer, not for all.

        Raises:
            ValueError: The timeout is not above 0, or more than 31 years.
        """
        if timeout is not None and not 0 < timeout <= MAX_TIMEOUT_SECONDS:
            raise ValueError(f"timeout must be a number of seconds above 0, or None, not {timeout}")
        self._timeout, self._each, self._since = timeout, each, time.monotonic()

    def restart(self) -> None:
        """Wait from now on, if the timeout is for each answer."""
        if self._each:
            self._since = time.monotonic()

    @property
    def left(self) -> float | None:
        """Seconds until the client gives up, at least 0; None if it does not."""
        return None if self._timeout is None else max(0.0, self._since + self._timeout - time.monotonic())

    @property
    def call_timeout(self) -> float | None:
        """Timeout of a call that is made now, in seconds; None for one that may bring any number of answers."""
        return None if self._each else self.left

    def check_pause(self, pause: float) -> float:
        """Return a pause in seconds, if it ends in time.

        Raises:
            DeadlineExceeded: It ends later.
        """
        left = self.left
        if pause and left is not None and pause >= left:
            raise DeadlineExceeded(f"the server accepts no requests for {pause:.3f} s, longer than the timeout allows")
        return pause

    def give_up(self) -> DeadlineExceeded:
        """Return the error of a client that waited long enough."""
        return DeadlineExceeded(f"there was no answer for {self._timeout:g} seconds")
