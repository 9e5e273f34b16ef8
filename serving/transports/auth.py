"""Who may ask: callers with a token, and those with a token for administrators."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Sequence
from pathlib import Path

from resnet import BadInput
from serving.errors import PermissionDenied, ServingError, Unauthenticated
from serving.logs import Tally
from serving.transports.call import Call
from serving.transports.choice import is_local
from serving.transports.tls import ServerTls, read_file

OPEN = "/grpc.health.v1.Health/"  # probes have no token, and learn no more than whether the server is up
# What changes the server for all others. Who is allowed to ask is not thereby allowed to do this.
ADMIN = tuple(f"/inference.GRPCInferenceService/RepositoryModel{verb}" for verb in ("Load", "Unload"))

log = logging.getLogger(__name__)


class Tokens:
    """What callers have to show as `authorization: Bearer TOKEN`.

    The tokens of administrators open every method, the others all but those in `ADMIN`. Where administrators have
    none, nobody may call these; but a server for this machine only, which asks nobody for a token, leaves them open.
    """

    def __init__(self, host: str, token: str | None, admin_token: str | None) -> None:
        """Demand tokens.

        Args:
            host: That the server listens on.
            token: Of callers; several in lines of their own, so that one can take the place of another. None lets
                everybody ask.
            admin_token: Of administrators, likewise.
        """
        self._callers, self._admins = _expect(token), _expect(admin_token)
        self._refused = Tally(log, "refused calls without the right token: %d more, the last from %s")
        self._closed = not (self._admins or (token is None and is_local(host)))

    def judge(self, call: Call) -> ServingError | None:
        """Return why a call may not be answered, if so, and count it."""
        if not (self._callers or self._admins or self._closed):
            return None
        refusal = self._look(call)
        if isinstance(refusal, Unauthenticated):
            self._refused.add(call.peer)
        return refusal

    def _look(self, call: Call) -> ServingError | None:
        if call.method.startswith(OPEN):
            return None
        given = next((value for key, value in call.metadata if key == "authorization"), "")
        given = given.encode() if isinstance(given, str) else given
        if _holds(given, self._admins):
            return None
        for_admins = call.method in ADMIN
        if (self._callers or (for_admins and self._admins)) and not _holds(given, self._callers):
            whose = " for administrators" if for_admins and self._admins else ""
            return Unauthenticated(f"this server wants a token{whose}, in the metadata `authorization: Bearer TOKEN`")
        if for_admins and self._admins:
            return PermissionDenied("this method wants the token for administrators")
        if for_admins and self._closed:
            return PermissionDenied(
                "this server loads and unloads no models by request: it was started without a token for administrators"
            )
        return None


def _expect(tokens: str | None) -> list[bytes]:
    return [f"Bearer {token}".encode() for token in (tokens or "").splitlines()]


def _holds(given: bytes, expected: Sequence[bytes]) -> bool:
    return any(hmac.compare_digest(given, one) for one in expected)


def read_tokens(path: Path) -> str:
    """Return the tokens that a file holds, one in each line.

    Raises:
        BadInput: It cannot be read, or holds none.
    """
    lines = [line.strip() for line in read_file(path).decode("ascii", "replace").splitlines()]
    tokens = [line for line in lines if line]
    if not tokens or not all(token.isascii() and token.isprintable() and " " not in token for token in tokens):
        raise BadInput(f"{path} holds no token: each is one line of ASCII letters, digits and signs")
    return "\n".join(tokens)


def warn_if_open(host: str, tls: ServerTls | None, token: str | None) -> None:
    """Say in the log what strangers could do."""
    if is_local(host):
        return
    if tls is None:
        log.warning("anybody on the way to %s can read what is asked and answered; --tls-cert encrypts it", host)
    if token is None and (tls is None or tls.client_authority is None):
        log.warning("anybody who reaches %s can ask; --token-file or --tls-client-ca say who may", host)
