"""Who may ask, and who may listen in: TLS whose files may be replaced under way, client certificates, and tokens."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from resnet import BadInput
from serving.guard import refuse
from serving.logs import Tally

OPEN = ("/grpc.health.v1.Health/",)  # probes have no token, and learn no more than whether the server is up
# What changes the server for all others. Who is allowed to ask is not thereby allowed to do this.
ADMIN = tuple(f"/inference.GRPCInferenceService/RepositoryModel{verb}" for verb in ("Load", "Unload"))
NO_ADMIN = "this server loads and unloads no models by request: it was started without a token for administrators"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tls:
    """PEM files.

    Attributes:
        certificate: The server's, with those that link it to its authority.
        key: The server's private key.
        client_authority: Clients must have a certificate of it; None asks for none.
    """

    certificate: Path
    key: Path
    client_authority: Path | None = None

    def to_credentials(self) -> grpc.ServerCredentials:
        """Return credentials that follow the files: whoever connects after they were replaced meets the new ones.

        Raises:
            BadInput: A file cannot be read.
        """
        state = self._stamp()
        configuration = self._read()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal state
            try:
                stamp = self._stamp()
                if stamp == state:
                    return None
                renewed = self._read()
            except BadInput as error:
                log.error("the certificate stays: %s", error)
                return None
            log.info("the certificate was renewed")
            state = stamp
            return renewed

        return grpc.dynamic_ssl_server_credentials(
            configuration,
            fetch,  # type: ignore[arg-type]  # None, says gRPC, leaves all as it is
            require_client_authentication=self.client_authority is not None,
        )

    def _files(self) -> list[Path]:
        return [path for path in (self.certificate, self.key, self.client_authority) if path is not None]

    def _stamp(self) -> list[int]:
        try:
            return [path.stat().st_mtime_ns for path in self._files()]
        except OSError as error:
            raise BadInput(f"{error.filename} cannot be read ({error.strerror})") from None

    def _read(self) -> grpc.ServerCertificateConfiguration:
        contents = [read_file(path) for path in self._files()]
        authority = contents[2] if self.client_authority is not None else None
        return grpc.ssl_server_certificate_configuration([(contents[1], contents[0])], authority)


def read_file(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        BadInput: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})") from None


def read_token(path: Path) -> str:
    """Return the token that a file holds, its only line.

    Raises:
        BadInput: It cannot be read, or holds no token.
    """
    token = read_file(path).decode("ascii", "replace").strip()
    if not token or not token.isprintable() or " " in token or not token.isascii():
        raise BadInput(f"{path} holds no token: it must be one line of ASCII letters, digits and signs")
    return token


def intercept(token: str | None, admin_token: str | None) -> list[TokenInterceptor]:
    """Return what asks calls for tokens: nothing where there are none, for it would cost every call a little."""
    return [TokenInterceptor(token, admin_token)] if token or admin_token else []


def closed(host: str, token: str | None, admin_token: str | None) -> Collection[str]:
    """Return the methods that nobody may call: those for administrators, where there is no token for them.

    A server for this machine only, which asks nobody for a token, leaves them open to whoever is on it.
    """
    return () if admin_token or (token is None and is_local(host)) else ADMIN


class TokenInterceptor(grpc.ServerInterceptor):
    """Refuses calls that do not carry `authorization: Bearer TOKEN`; health checks need none.

    The token of administrators opens every method, the other one all but those in `ADMIN`.
    """

    def __init__(self, token: str | None, admin_token: str | None = None) -> None:
        """Demand `token`, where it is not None, and of administrators `admin_token`."""
        self._callers, self._admins = _expect(token), _expect(admin_token)
        self._refused = Tally(log, "refused calls without the right token: %d more, the last from %s")

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        """Pass a call on, or answer UNAUTHENTICATED or PERMISSION_DENIED."""
        if refusal := self._look(details.method, details.invocation_metadata):
            return refuse(*refusal, self._refused.add)
        return continuation(details)

    def judge(
        self, method: str, metadata: Iterable[tuple[str, str | bytes]], peer: str
    ) -> tuple[grpc.StatusCode, str] | None:
        """Return with what status and text to refuse a call, if at all, and count it.

        Args:
            method: Path of the method.
            metadata: Of the call.
            peer: Whose call it is.
        """
        refusal = self._look(method, metadata)
        if refusal:
            self._refused.add(peer)
        return refusal

    def _look(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> tuple[grpc.StatusCode, str] | None:
        for_admins = method in ADMIN and bool(self._admins)
        if method.startswith(OPEN) or not (self._callers or for_admins):
            return None
        given = next((value for key, value in metadata if key == "authorization"), "")
        given = given.encode() if isinstance(given, str) else given
        if _holds(given, self._admins) or (not for_admins and _holds(given, self._callers)):
            return None
        if for_admins and _holds(given, self._callers):
            return grpc.StatusCode.PERMISSION_DENIED, "this method wants the token for administrators"
        whose = " for administrators" if for_admins else ""
        return (
            grpc.StatusCode.UNAUTHENTICATED,
            f"this server wants a token{whose}, in the metadata `authorization: Bearer TOKEN`",
        )


def _expect(token: str | None) -> bytes:
    return f"Bearer {token}".encode() if token else b""


def _holds(given: bytes, expected: bytes) -> bool:
    return bool(expected) and hmac.compare_digest(given, expected)


def is_local(host: str) -> bool:
    """Say whether a server that listens on `host` is reached from this machine only."""
    return host in ("localhost", "::1", "[::1]") or host.startswith(("127.", "unix:"))


def warn_if_open(host: str, tls: Tls | None, token: str | None) -> None:
    """Say in the log what strangers could do."""
    if is_local(host):
        return
    if tls is None:
        log.warning("anybody on the way to %s can read what is asked and answered; --tls-cert encrypts it", host)
    if token is None and (tls is None or tls.client_authority is None):
        log.warning("anybody who reaches %s can ask; --token-file or --tls-client-ca say who may", host)
