"""The signature of a version: Ed25519 (RFC 8032), over the manifest, which contains the hash of every file.

Keys are PEM files as `openssl genpkey -algorithm ed25519` writes them. openssl can check the signatures too.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from export import files, manifest
from export.manifest import SIGNATURE, Manifest
from resnet import BadInput, CheckFailed
from resnet.files import read_file


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
    (folder / SIGNATURE).write_bytes(key.sign(manifest.read_content(folder)))


def read(folder: Path, key: Ed25519PublicKey) -> Manifest:
    """Read the manifest of the version in `folder`, after its signature.

    Raises:
        BadInput: As `export.manifest.read`.
        CheckFailed: There is no signature, or this key did not sign this manifest.
    """
    content = manifest.read_content(folder)
    try:
        key.verify(files.read(folder / SIGNATURE), content)
    except FileNotFoundError:
        raise CheckFailed(f"{folder} is not signed, there is no {SIGNATURE}") from None
    except OSError as error:
        raise CheckFailed(f"{folder / SIGNATURE} cannot be read ({error.strerror})") from None
    except InvalidSignature:
        raise CheckFailed(f"{folder} is not signed by the trusted key, or its manifest was changed since") from None
    return manifest.parse(folder, content)


def _read(option: str, path: Path) -> bytes:
    try:
        return read_file(path)
    except BadInput as error:
        raise BadInput(f"{option} {error}") from None
