"""Tokens: who may call, and who may change which models are served."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from resnet.tokens import parse_tokens, read_tokens
from serving.errors import PermissionDenied, ServingError, Unauthenticated
from serving.logs import RateLimitedLog
from serving.transports.call import Call
from serving.transports.choice import is_local
from serving.transports.files import FollowedFiles
from serving.transports.tls import ServerTls

OPEN = "/grpc.health.v1.Health/"  # health probes have no token
# Methods that change the server for all callers: the right to classify does not include them.
ADMIN = (
    *(f"/inference.GRPCInferenceService/RepositoryModel{verb}" for verb in ("Load", "Unload")),
    *(f"/resnet.v1.Admin/{method}" for method in ("SetShadow", "StartRollout", "StopRollout")),
)
BEARER = b"Bearer "
REFRESH_SECONDS = 1.0  # between looks at the files

log = logging.getLogger(__name__)


class Tokens:
    """The tokens that callers give as `authorization: Bearer TOKEN`.

    An administrator's token allows every method, a caller's every method except those in `ADMIN`. Without
    administrators' tokens nobody may call these, except on a server without tokens that listens on this machine only.

    Attributes:
        are_required: Whether callers need one.
    """

    def __init__(self, host: str, token: str | Path | None, admin_token: str | Path | None) -> None:
        """Require tokens.

        Args:
            host: The host that the server listens on.
            token: The callers' tokens, one per line, so that tokens can be rotated, or the file that has them, which
                is read again when it changes; None requires none.
            admin_token: The administrators', likewise.

        Raises:
            BadInput: A file cannot be read, or a file or text holds no token.
        """
        self._callers, self._admins = _AcceptedTokens(token), _AcceptedTokens(admin_token)
        self._refused = RateLimitedLog(log, "refused calls without the right token: %d more, the last from %s")
        self._closed = not (admin_token or (token is None and is_local(host)))
        self._open = not (token or admin_token or self._closed)
        self.are_required = token is not None

    def check(self, call: Call) -> ServingError | None:
        """Return why a call is not allowed, None if it is."""
        if self._open:
            return None
        refusal = self._find_refusal(call)
        if isinstance(refusal, Unauthenticated):
            self._refused.add(call.peer)
        return refusal

    def _find_refusal(self, call: Call) -> ServingError | None:
        if call.method.startswith(OPEN):
            return None
        given = next((value for key, value in call.metadata if key == "authorization"), "")
        given = given.encode() if isinstance(given, str) else given
        if given[: len(BEARER)].lower() == BEARER.lower():  # in any case, as RFC 9110 has it
            given = BEARER + given[len(BEARER) :]
        admins, callers = self._admins.find(), self._callers.find()
        if _contains(admins, given):
            return None
        for_admins = call.method in ADMIN
        if (callers or (for_admins and admins)) and not _contains(callers, given):
            kind = "an administrator's token" if for_admins and admins else "a token"
            return Unauthenticated(f"this server requires {kind}, given as `authorization: Bearer TOKEN`")
        if for_admins and admins:
            return PermissionDenied("this method requires an administrator's token")
        if for_admins and self._closed:
            return PermissionDenied(
                "this server takes no request that changes its models: it was started without an administrator's token"
            )
        return None


class _AcceptedTokens:
    """The tokens of callers or of administrators, which a file may have."""

    def __init__(self, tokens: str | Path | None) -> None:
        self._headers: Sequence[bytes] = ()
        self._file: FollowedFiles[Sequence[bytes]] | None = None
        self._next = 0.0
        if isinstance(tokens, Path):
            self._file = FollowedFiles(f"the token file {tokens}", [tokens], lambda: _to_headers(read_tokens(tokens)))
        elif tokens is not None:  # an empty text must not mean that none is needed
            self._headers = _to_headers(parse_tokens(tokens, "the given text"))

    def find(self) -> Sequence[bytes]:
        """Return the headers that give one of the tokens; a changed file counts within `REFRESH_SECONDS`."""
        if self._file is None:
            return self._headers
        if (now := time.monotonic()) >= self._next:
            self._next = now + REFRESH_SECONDS
            self._file.refresh()
        return self._file.content


def _to_headers(tokens: Sequence[str]) -> Sequence[bytes]:
    return [BEARER + token.encode() for token in tokens]


def _contains(headers: Sequence[bytes], given: bytes) -> bool:
    return any(hmac.compare_digest(given, header) for header in headers)


def warn_if_open(host: str, tls: ServerTls | None, token: Path | None) -> None:
    """Warn of a server that other machines can reach without TLS or tokens."""
    if is_local(host):
        return
    if tls is None:
        log.warning("requests and responses on %s are not encrypted; set --tls-cert and --tls-key", host)
    if token is None and (tls is None or tls.client_authority is None):
        log.warning("anyone who can reach %s may call; restrict it with --token-file or --tls-client-ca", host)
