"""What a server takes on, as options: each declared once, with its type, default, bounds, and what it is for."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from training.images import MAX_PIXELS


def option(default: Any, meaning: str, low: float = -math.inf, high: float = math.inf) -> Any:
    """Declare an option, with what `resnet serve --help` says of it and the least and largest value.

    One whose default is MISSING must be given, and is a positional argument on the command line.
    """
    return dataclasses.field(default=default, metadata={"help": meaning, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes on; `resnet serve --help` says what each is.

    At worst its memory holds `max_calls` requests of `max_message_bytes`, and about twelve bytes for each of
    `max_unpacked_pixels`. Where strangers can ask, lower the first two, or give out tokens.
    """

    max_images: int = option(256, "images in one request", low=1)
    # The decoder's own limit, a few more than phones take.
    max_image_pixels: int = option(
        MAX_PIXELS, "pixels of one encoded image, before it is unpacked", low=1, high=MAX_PIXELS
    )
    # A small file may have many: these are seconds of work.
    max_request_pixels: int = option(8 * MAX_PIXELS, "pixels of all encoded images of one request", low=1)
    # At most 1.5 GB.
    max_unpacked_pixels: int = option(
        2 * MAX_PIXELS, "pixels that are unpacked at a time, for all requests together; more wait", low=1
    )
    max_message_bytes: int = option(64 * 2**20, "bytes of one request", low=1)
    # These hold any token.
    max_metadata_bytes: int = option(16 * 2**10, "bytes of the headers of one request, as HTTP/2 counts them", low=1024)
    max_calls: int = option(256, "calls at a time, streams included; each stream has a thread while it is open", low=1)
    # Half of the calls: no connection takes all.
    max_streams: int = option(128, "calls at a time on one connection; more wait in the client", low=1)
    # Half of the usual limit of open files.
    max_connections: int = option(512, "connections at a time; more are closed", low=1)
    handshake_seconds: float = option(10.0, "how long a new connection may take over TLS and its first frame", low=0.1)
    # Clients open another one unseen; those of gRPC close theirs after half an hour.
    idle_seconds: float = option(3600.0, "when a connection without calls is closed", low=1)
    # The streams of the dead hold threads.
    keepalive_seconds: float = option(
        60.0, "how long a connection may be silent before its client is asked whether it is there", low=1
    )
    keepalive_timeout_seconds: float = option(20.0, "how long to wait for the client to say so", low=1)
    # gRPC's own 5 minutes break off clients with common settings.
    min_ping_seconds: float = option(10.0, "how often a client may ask whether the server is there", low=0)
    max_ping_strikes: int = option(2, "how many times it may ask more often, before its connection is closed", low=1)

    def to_options(self) -> list[tuple[str, int]]:
        """Return what gRPC itself has to know of this."""
        return [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            # Between these two gRPC would refuse at random.
            ("grpc.max_metadata_size", self.max_metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.max_metadata_bytes),
            ("grpc.max_concurrent_streams", self.max_streams),
            # gRPC would count streams that are answered and not put away yet, which no client can know of.
            ("grpc.http.overload_protection", 0),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.server_handshake_timeout_ms", int(self.handshake_seconds * 1000)),
            ("grpc.max_connection_idle_ms", int(self.idle_seconds * 1000)),
            ("grpc.keepalive_time_ms", int(self.keepalive_seconds * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_seconds * 1000)),
            ("grpc.http2.ping_timeout_ms", int(self.keepalive_timeout_seconds * 1000)),  # the longer one counts
            ("grpc.http2.min_ping_interval_without_data_ms", int(self.min_ping_seconds * 1000)),
            # Otherwise connections without calls are never asked, and may ask every two hours.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_ping_strikes", self.max_ping_strikes),
        ]
