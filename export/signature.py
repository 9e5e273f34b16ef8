"""Who made a version: its signature, and the check against a public key.

model.sig is made with an ECDSA key and covers every file of the version; `export.bundle` defines its format.
manifest.sig, of resnet 0.2, was made with an Ed25519 key (RFC 8032) and covers the manifest, which has the hashes of
all other files; it is only read. Keys are PEM files, as openssl writes them.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from export import bundle, files, manifest
from export.manifest import OLD_SIGNATURE, SIGNATURE, Manifest
from resnet import BadInput, CheckFailed
from resnet.files import read_file

PublicKey = EllipticCurvePublicKey | Ed25519PublicKey
KINDS = {SIGNATURE: "an ECDSA key", OLD_SIGNATURE: "an Ed25519 key"}


def load_private(path: Path) -> EllipticCurvePrivateKey:
    """Read a private key.

    Raises:
        BadInput: The file cannot be read, has a password, or holds another kind of key.
    """
    try:
        key = serialization.load_pem_private_key(_read("--sign", path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInput(f"--sign {path} is not a private key in PEM without a password ({error})") from None
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in bundle.HASHES:
        raise BadInput(
            f"--sign {path} is not an ECDSA key on P-256, P-384 or P-521; "
            "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem` makes one"
        )
    return key


def load_public(path: Path) -> PublicKey:
    """Read a public key.

    Raises:
        BadInput: The file cannot be read or holds another kind of key.
    """
    try:
        key = serialization.load_pem_public_key(_read("--trust", path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInput(f"--trust {path} is not a public key in PEM ({error})") from None
    if isinstance(key, Ed25519PublicKey) or (
        isinstance(key, EllipticCurvePublicKey) and key.curve.name in bundle.HASHES
    ):
        return key
    raise BadInput(
        f"--trust {path} is neither an ECDSA key on P-256, P-384 or P-521 nor an Ed25519 key; "
        "`openssl pkey -in KEY -pubout` prints the public one"
    )


def sign(folder: Path, key: EllipticCurvePrivateKey) -> None:
    """Write model.sig into the folder of a version; it covers all files that are there."""
    digests = {name: files.compute_hash(folder / name) for name in _list_files(folder)}
    bundle.write(folder / SIGNATURE, key, folder.parent.name, digests)


def read(folder: Path, key: PublicKey) -> Manifest:
    """Read the manifest of the version in `folder`, after its signature.

    model.sig must cover the manifest, the files that the manifest lists, with the same hashes, and whatever else is in
    the folder. Whether the listed files still have these hashes is checked later, as without a signature.

    Raises:
        BadInput: As `export.manifest.read`.
        CheckFailed: There is no signature, or this key did not sign these files.
    """
    content = manifest.read_content(folder)
    path = _find(folder, key)
    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(files.read(path), content)
            return manifest.parse(folder, content)
        signed = bundle.read(path, key)
        if signed.get(manifest.NAME) != hashlib.sha256(content).hexdigest():
            raise CheckFailed(f"{folder / manifest.NAME} is not the file that was signed")
        recorded = manifest.parse(folder, content)
        _compare(folder, signed, {**recorded.files, manifest.NAME: signed[manifest.NAME]})
        return recorded
    except InvalidSignature:
        raise CheckFailed(f"{folder} is not signed by the trusted key, or its manifest was changed since") from None
    except OSError as error:
        raise CheckFailed(f"{error.filename} cannot be read ({error.strerror})") from None


def _find(folder: Path, key: PublicKey) -> Path:
    """Return the path of the signature that a key can check; raise `CheckFailed` if there is none."""
    name, other = (OLD_SIGNATURE, SIGNATURE) if isinstance(key, Ed25519PublicKey) else (SIGNATURE, OLD_SIGNATURE)
    if os.path.lexists(folder / name):
        return folder / name
    if os.path.lexists(folder / other):
        raise CheckFailed(f"{folder} has no {name} for {KINDS[name]}, only {other} for {KINDS[other]}; trust that key")
    raise CheckFailed(f"{folder} is not signed, there is no {name}")


def _list_files(folder: Path) -> set[str]:
    """Return the paths inside a folder of all that is no folder, except model.sig; hidden files and links too."""
    entries = files.list_entries(folder).items()
    return {name for name, status in entries if not stat.S_ISDIR(status.st_mode)} - {SIGNATURE}


def _compare(folder: Path, signed: Mapping[str, str], listed: Mapping[str, str]) -> None:
    """Compare the files that were signed with those of a version. A file that the manifest does not list is hashed.

    Raises:
        CheckFailed: One has another hash, or is missing from the signature or from the version.
    """
    found = _list_files(folder) | listed.keys()
    for name in sorted(signed.keys() | found):
        if name not in signed:
            raise CheckFailed(f"{str(folder / name)!r} is not among the signed files")
        if name not in found:
            raise CheckFailed(f"{str(folder / name)!r} is missing, though it was signed")
        if signed[name] != (listed.get(name) or files.compute_hash(folder / name)):
            raise CheckFailed(f"{folder / name} is not the file that was signed")


def _read(option: str, path: Path) -> bytes:
    try:
        return read_file(path)
    except BadInput as error:
        raise BadInput(f"{option} {error}") from None
