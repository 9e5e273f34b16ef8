"""TLS: certificates that may be renewed while the server runs, and certificates of clients."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import grpc

from resnet import BadInput
from resnet.files import read_file
from serving.transports.files import FollowedFiles

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

SOON = timedelta(days=14)
MIN_RSA_BITS = 1024
DAY_SECONDS = 86400

log = logging.getLogger(__name__)


class _Pems(NamedTuple):
    """What the files contain.

    Attributes:
        configuration: As gRPC takes it.
        expiry: When the first certificate of the chain ends.
    """

    configuration: grpc.ServerCertificateConfiguration
    expiry: datetime


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

        A certificate that has expired, or will soon, is logged now and then once a day while clients connect.

        Raises:
            BadInput: A file cannot be read or used.
        """
        files = self.follow("the certificate")
        used, warned = files.content, time.monotonic()
        self._warn_of_expiry(used.expiry)

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal used, warned
            files.refresh()
            if time.monotonic() - warned >= DAY_SECONDS:
                warned = time.monotonic()
                self._warn_of_expiry(files.content.expiry)
            if files.content is used:
                return None
            used = files.content
            return used.configuration

        return grpc.dynamic_ssl_server_credentials(
            used.configuration,
            fetch,  # type: ignore[arg-type]  # gRPC documents None as no change
            require_client_authentication=self.client_authority is not None,
        )

    def follow(self, what: str) -> FollowedFiles[_Pems]:
        """Return the content of the files, as they are renewed; `what` names them in the log.

        Raises:
            BadInput: A file cannot be read or used.
        """
        paths = [path for path in (self.certificate, self.key, self.client_authority) if path is not None]
        return FollowedFiles(what, paths, self.read)

    def read(self) -> _Pems:
        """Return the content of the files, which gRPC would refuse without a reason.

        Raises:
            BadInput: A file cannot be read or used; the key is not the certificate's, or of a kind that gRPC refuses.
        """
        from cryptography import x509
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization

        certificate, key = read_file(self.certificate), read_file(self.key)
        authority = read_file(self.client_authority) if self.client_authority else None
        try:
            chain = x509.load_pem_x509_certificates(certificate)
        except ValueError:
            raise BadInput(f"{self.certificate} holds no certificate in PEM") from None
        try:
            private = serialization.load_pem_private_key(key, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise BadInput(f"{self.key} holds no private key in PEM, or one with a password") from None
        if private.public_key() != chain[0].public_key():
            raise BadInput(f"the key in {self.key} is not that of the first certificate in {self.certificate}")
        if authority is not None:
            try:
                x509.load_pem_x509_certificates(authority)
            except ValueError:
                raise BadInput(f"{self.client_authority} holds no certificate in PEM") from None
        self._check_kind(private, chain[0])
        configuration = grpc.ssl_server_certificate_configuration([(key, certificate)], authority)
        return _Pems(configuration, min(each.not_valid_after_utc for each in chain))

    def _check_kind(self, key: PrivateKeyTypes, certificate: x509.Certificate) -> None:
        """Raise an error for a key that gRPC's servers refuse or, without a word in any log, its clients."""
        from cryptography.hazmat.primitives.asymmetric import ec, rsa
        from cryptography.x509.oid import PublicKeyAlgorithmOID

        match key:
            case rsa.RSAPrivateKey():
                plain = certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSAES_PKCS1_v1_5
                if plain and key.key_size >= MIN_RSA_BITS:
                    return
            case ec.EllipticCurvePrivateKey(curve=ec.SECP256R1() | ec.SECP384R1()):
                return
        raise BadInput(
            f"the key in {self.key} is of a kind that gRPC's clients refuse; make one of RSA with {MIN_RSA_BITS} bits "
            "or more, or of the elliptic curve P-256 or P-384"
        )

    def _warn_of_expiry(self, expiry: datetime) -> None:
        now = datetime.now(UTC)
        if expiry <= now:
            log.error("the certificate in %s expired on %s: clients refuse it", self.certificate, expiry.date())
        elif expiry <= now + SOON:
            log.warning("the certificate in %s expires on %s", self.certificate, expiry.date())
