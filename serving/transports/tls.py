"""TLS: certificates that may be renewed while the server runs, and certificates of clients."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import grpc

from resnet import BadInput

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerTls:
    """PEM files of a server.

    Attributes:
        certificate: The server's certificate chain.
        key: The server's private key.
        client_authority: Authority of the clients' certificates; None demands none.
    """

    certificate: Path
    key: Path
    client_authority: Path | None = None

    def to_credentials(self) -> grpc.ServerCredentials:
        """Return credentials that follow the files: connections made after a renewal use the new ones.

        Raises:
            BadInput: A file cannot be read.
        """
        state = self._stamp()
        configuration = self._read_all()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal state
            try:
                stamp = self._stamp()
                if stamp == state:
                    return None
                renewed = self._read_all()
            except BadInput as error:
                log.error("the certificate could not be renewed, the old one stays: %s", error)
                return None
            log.info("the certificate was renewed")
            state = stamp
            return renewed

        return grpc.dynamic_ssl_server_credentials(
            configuration,
            fetch,  # type: ignore[arg-type]  # gRPC documents None as no change
            require_client_authentication=self.client_authority is not None,
        )

    def _files(self) -> list[Path]:
        return [path for path in (self.certificate, self.key, self.client_authority) if path is not None]

    def _stamp(self) -> list[int]:
        try:
            return [path.stat().st_mtime_ns for path in self._files()]
        except OSError as error:
            raise BadInput(f"{error.filename} cannot be read ({error.strerror})") from None

    def _read_all(self) -> grpc.ServerCertificateConfiguration:
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
