"""Splits: while a new version is rolled out, it and the stable version share the requests that choose neither."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

from serving.errors import REQUEST_ID

FindKey = Callable[[str], str]
"""Returns what a request has in a header, or else its id."""

HASH_BYTES = 8


@dataclass(frozen=True)
class TrafficSplit:
    """How two versions of a model share requests. One key gets one version, also after `percent` has grown.

    Attributes:
        stable: Number of the version that answers the other requests.
        canary: Number of the new version.
        percent: Share of the keys that the new version answers, 0 to 100.
        header: The header that holds a request's key.
        salt: Secret of the rollout: nobody can choose a key for a version.
    """

    stable: int
    canary: int
    percent: float
    header: str = REQUEST_ID
    salt: str = ""

    def choose(self, find_key: FindKey) -> int:
        """Return the number of the version that answers a request."""
        # With the number, so that it is not always the same callers who try what is new.
        text = f"{self.canary}:{find_key(self.header)}".encode("utf-8", "backslashreplace")
        salt = self.salt.encode()
        place = int.from_bytes(blake2b(text, digest_size=HASH_BYTES, key=salt).digest()) / 256**HASH_BYTES
        return self.canary if 100 * place < self.percent else self.stable
