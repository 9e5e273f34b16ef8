"""The options of a client's channel."""

from __future__ import annotations

from serving.client.channel import to_options
from serving.client.retries import FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS, MAX_RETRIES


def test_a_server_that_is_back_is_found_before_the_retries_end() -> None:
    """Otherwise a rolling restart fails requests: the next server stops while the client still waits for the first."""
    pauses_ms = [1e3 * min(FIRST_BACKOFF_SECONDS * 2**retry, MAX_BACKOFF_SECONDS) for retry in range(MAX_RETRIES)]
    options = dict(to_options("127.0.0.1:1", None))
    longest_ms = options["grpc.max_reconnect_backoff_ms"]
    assert isinstance(longest_ms, int)
    assert 2 * longest_ms < sum(pauses_ms)
