"""model.sig: a signature over the files of a version, by the OpenSSF Model Signing specification 1.0.

A statement lists the SHA-256 of each file (in-toto Statement 1). An envelope holds the statement and its signature
(DSSE 1.0). A bundle holds the envelope and a hint at the key (Sigstore Bundle 0.3). The package model-signing of PyPI
writes and reads the same. The specification is at https://github.com/ossf/model-signing-spec.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from resnet import CheckFailed
from resnet.files import open_regular

HASHES = {"secp256r1": SHA256(), "secp384r1": SHA384(), "secp521r1": SHA512()}  # of ECDSA, by the curve of the key
MAX_BYTES = 1 << 20  # enough for thousands of files
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
METHOD, ALGORITHM = "files", "sha256"

_Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Layer = TypeVar("_Layer", "_Bundle", "_Kind", "_Statement")


class _Resource(msgspec.Struct):
    name: str
    algorithm: str
    digest: _Sha256


class _Serialization(msgspec.Struct):
    method: str
    hash_type: str
    allow_symlinks: bool
    ignore_paths: list[str] = []


class _Predicate(msgspec.Struct):
    serialization: _Serialization
    resources: list[_Resource]


class _Digest(msgspec.Struct):
    sha256: _Sha256


class _Subject(msgspec.Struct):
    name: str
    digest: _Digest


class _Kind(msgspec.Struct, rename="camel"):
    type: str = msgspec.field(name="_type")
    predicate_type: str


class _Statement(_Kind):
    subject: Annotated[list[_Subject], msgspec.Meta(min_length=1, max_length=1)]
    predicate: _Predicate


class _Signature(msgspec.Struct):
    sig: bytes
    keyid: str | None = ""


class _Envelope(msgspec.Struct, rename="camel"):
    payload: bytes
    payload_type: str
    signatures: Annotated[list[_Signature], msgspec.Meta(min_length=1, max_length=1)]


class _KeyIdentifier(msgspec.Struct):
    hint: str | None = None


class _Material(msgspec.Struct, rename="camel"):
    public_key: _KeyIdentifier
    tlog_entries: list[msgspec.Raw] = []


class _Bundle(msgspec.Struct, rename="camel"):
    media_type: str
    verification_material: _Material
    dsse_envelope: _Envelope


def write(path: Path, key: EllipticCurvePrivateKey, model: str, digests: Mapping[str, str]) -> None:
    """Sign files.

    Args:
        path: The signature, beside the files that it covers.
        key: On a curve of `HASHES`.
        model: Name of the model, for the reader.
        digests: SHA-256 of each file, by path inside the folder.
    """
    resources = [_Resource(name, ALGORITHM, digests[name]) for name in sorted(digests)]
    serialization = _Serialization(METHOD, ALGORITHM, allow_symlinks=False, ignore_paths=[path.name])
    subject = _Subject(model, _Digest(_hash_all(resources)))
    payload = msgspec.json.encode(_Statement(STATEMENT, PREDICATE, [subject], _Predicate(serialization, resources)))
    signature = key.sign(_encode(PAYLOAD, payload), ECDSA(HASHES[key.curve.name]))
    envelope = _Envelope(payload, PAYLOAD, [_Signature(signature)])
    material = _Material(_KeyIdentifier(_hint(key.public_key())))
    path.write_bytes(msgspec.json.encode(_Bundle(BUNDLE, material, envelope)))


def read(path: Path, key: EllipticCurvePublicKey) -> dict[str, str]:
    """Return the SHA-256 of each file that a signature covers, by path inside the folder.

    The paths that the signer ignored do not matter: a file that is not covered is not signed.

    Raises:
        OSError: It cannot be read.
        CheckFailed: It is not by this key, or not of this format.
    """
    with open_regular(path, follow=False) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise CheckFailed(f"{path} is larger than {MAX_BYTES >> 20} MiB, which no signature is")
    bundle = _decode(path, content, _Bundle)
    envelope, hint = bundle.dsse_envelope, bundle.verification_material.public_key.hint
    _expect(path, ("mediaType", bundle.media_type, BUNDLE), ("payloadType", envelope.payload_type, PAYLOAD))
    if hint and hint != _hint(key):  # versions before 1.1 of model_signing gave none
        raise CheckFailed(f"{path} is by another key than the trusted one, as its hint says")
    try:
        signed = _encode(envelope.payload_type, envelope.payload)
        key.verify(envelope.signatures[0].sig, signed, ECDSA(HASHES[key.curve.name]))
    except InvalidSignature:
        raise CheckFailed(f"{path} is not by the trusted key, or was changed since") from None
    kind = _decode(path, envelope.payload, _Kind)
    _expect(path, ("_type", kind.type, STATEMENT), ("predicateType", kind.predicate_type, PREDICATE))
    return _list_digests(path, _decode(path, envelope.payload, _Statement))


def _list_digests(path: Path, statement: _Statement) -> dict[str, str]:
    """Return the digests of a statement, by file.

    Raises:
        CheckFailed: It has digests of another kind, or contradicts itself.
    """
    serialization, resources = statement.predicate.serialization, statement.predicate.resources
    _expect(path, ("method", serialization.method, METHOD), ("hash_type", serialization.hash_type, ALGORITHM))
    _expect(path, *(("algorithm", resource.algorithm, ALGORITHM) for resource in resources))
    if statement.subject[0].digest.sha256 != _hash_all(resources):
        raise _invalid(path, "its subject has the digest of other files")
    digests = {resource.name: resource.digest for resource in resources}
    if len(digests) != len(resources):
        raise _invalid(path, "it lists a file twice")
    return digests


def _hash_all(resources: Iterable[_Resource]) -> str:
    """Return the SHA-256 of the digests of all resources, in their order."""
    return hashlib.sha256(b"".join(bytes.fromhex(resource.digest) for resource in resources)).hexdigest()


def _encode(kind: str, payload: bytes) -> bytes:
    """Return what is signed for a payload: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)


def _hint(key: EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key in PEM."""
    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _decode(path: Path, content: bytes, kind: type[_Layer]) -> _Layer:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(path, str(error)) from None


def _expect(path: Path, *fields: tuple[str, str, str]) -> None:
    """Raise `CheckFailed` if a field, given as its name, value and expected value, has another value."""
    for name, value, expected in fields:
        if value != expected:
            raise _invalid(path, f"its {name} is not {expected}")


def _invalid(path: Path, reason: str) -> CheckFailed:
    return CheckFailed(f"{path} is no signature by the OpenSSF Model Signing specification 1.0 ({reason})")
