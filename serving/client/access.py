"""How a command reaches a server: TLS and token, as options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grpc

from resnet import BadInput
from resnet.files import read_file
from resnet.options import option
from resnet.tokens import read_tokens
from serving.client.channel import CallMetadata, Tls
from serving.errors import DeadlineExceeded, ServingError, Unauthenticated, Unavailable


class CallerAccess(NamedTuple):
    """What a server asks of its callers.

    Attributes:
        tls: Certificates; None connects without encryption.
        token: Bearer token to send; None sends none.
    """

    tls: Tls | None = None
    token: str | None = None

    @property
    def metadata(self) -> CallMetadata:
        """What each call has to send."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def open_channel(self, address: str, options: Sequence[tuple[str, str | int]] = ()) -> grpc.Channel:
        """Return a channel to HOST:PORT."""
        if self.tls is None:
            return grpc.insecure_channel(address, options)
        name = [("grpc.ssl_target_name_override", self.tls.name)] if self.tls.name else []
        return grpc.secure_channel(address, self.tls.to_credentials(), [*options, *name])


ANYONE = CallerAccess()  # where a server asks nothing of its callers


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """Options of a command that calls a server."""

    tls_ca: Path | None = option(None, "CA certificate in PEM; enables TLS", group="security")
    tls_cert: Path | None = option(None, "client certificate in PEM")
    tls_key: Path | None = option(None, "private key of the client certificate, in PEM")
    tls_name: str | None = option(
        None, "host name in the servers' certificates; required for several servers", metavar="NAME"
    )
    token_file: Path | None = option(None, "file with the token to send")

    def load(self) -> CallerAccess:
        """Read the files.

        Raises:
            BadInput: One cannot be read, or options that belong together are not.
        """
        if self.tls_name and not self.tls_ca:
            raise BadInput("--tls-name needs --tls-ca")
        if (self.tls_cert is None) != (self.tls_key is None) or (self.tls_cert and not self.tls_ca):
            raise BadInput("--tls-cert and --tls-key belong together, and need --tls-ca")
        authority, certificate, key = (
            None if path is None else read_file(path) for path in (self.tls_ca, self.tls_cert, self.tls_key)
        )
        tls = None if authority is None else Tls(authority, certificate, key, self.tls_name)
        return CallerAccess(tls, None if self.token_file is None else read_tokens(self.token_file)[0])


def to_bad_input(error: ServingError, server: str) -> BadInput:
    """Return a failed call as a sentence for the user of a command; `server` is what was called."""
    match error:
        case Unavailable():
            return BadInput(f"no server answers at {server} ({error}); start one with `resnet serve`")
        case DeadlineExceeded():
            return BadInput(f"the server at {server} did not answer in time")
        case Unauthenticated():
            return BadInput(f"the server refused: {error}; give the file with its token as --token-file")
    return BadInput(f"the server refused: {error}")
