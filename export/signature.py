"""The signature of a version: Ed25519 (RFC 8032), over the manifest, which contains the hash of every file.

Keys are PEM files as `openssl genpkey -algorithm ed25519` writes them. openssl can check the signatures too.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from export.manifest import NAME as MANIFEST
from resnet import BadInput, CheckFailed
from resnet.files import read_file

NAME = "manifest.sig"


def load_private(path: Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        BadInput: The file cannot be read, has a password, or holds another kind of key.
    """
    try:
        key = serialization.load_pem_private_key(_read("--sign", path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInput(f"--sign {path} is not a private key in PEM without a password ({error})") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise BadInput(f"--sign {path} is not an Ed25519 key; `openssl genpkey -algorithm ed25519` makes one")
    return key


def load_public(path: Path) -> Ed25519PublicKey:
    """Read a public key.

    Raises:
        BadInput: The file cannot be read or holds another kind of key.
    """
    try:
        key = serialization.load_pem_public_key(_read("--trust", path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInput(f"--trust {path} is not a public key in PEM ({error})") from None
    if not isinstance(key, Ed25519PublicKey):
        raise BadInput(f"--trust {path} is not an Ed25519 key; `openssl pkey -in KEY -pubout` prints the public one")
    return key


def sign(folder: Path, key: Ed25519PrivateKey) -> None:
    """Write manifest.sig, 64 bytes, beside the manifest of the version in `folder`."""
    (folder / NAME).write_bytes(key.sign((folder / MANIFEST).read_bytes()))


def check(folder: Path, key: Ed25519PublicKey) -> None:
    """Check the signature of the version in `folder`.

    Raises:
        CheckFailed: There is no signature, or this key did not sign this manifest.
    """
    try:
        key.verify((folder / NAME).read_bytes(), (folder / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise CheckFailed(f"{folder} is not signed, there is no {Path(error.filename).name}") from None
    except InvalidSignature:
        raise CheckFailed(f"{folder} is not signed by the trusted key, or its manifest was changed since") from None


def _read(option: str, path: Path) -> bytes:
    try:
        return read_file(path)
    except BadInput as error:
        raise BadInput(f"{option} {error}") from None
