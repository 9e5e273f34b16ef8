"""A signature vouches for a version; whoever demands one is not served without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export import files, manifest, signature
from export.signature import PublicKey
from resnet import BadInput, CheckFailed, cli
from tests.versions import write_version

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")

# Each way in which openssl writes a private key on P-256: after its parameters, alone, and in PKCS #8.
FORMS = {
    "with parameters": ["ecparam", "-name", "prime256v1", "-genkey"],
    "alone": ["ecparam", "-name", "prime256v1", "-genkey", "-noout"],
    "PKCS #8": ["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
}


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public one."""
    return make_keys(tmp_path, "key", *FORMS["alone"])


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """The folder of a version without a signature."""
    return write_version(tmp_path / "models" / "colors" / "1")


def make_keys(folder: Path, name: str, *command: str) -> tuple[Path, Path]:
    """Return the files of a private key that openssl makes, and of its public one."""
    private, public = folder / f"{name}.pem", folder / f"{name}-public.pem"
    subprocess.run(["openssl", *command, "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


def sign_as_before(version: Path, key: Ed25519PrivateKey) -> None:
    """Write manifest.sig, as resnet 0.2 did."""
    (version / "manifest.sig").write_bytes(key.sign((version / "manifest.json").read_bytes()))


def refuse(version: Path, key: PublicKey) -> str:
    """Return why a version is refused."""
    with pytest.raises(CheckFailed) as caught:
        signature.read(version, key)
    return str(caught.value)


def test_an_export_is_signed_and_verified(
    run: Path, keys: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By us and by model_signing; one changed byte of the manifest, or no signature, is one sentence."""
    private, public = keys
    model = tmp_path / "models" / "digits"
    assert cli.main(["export", str(run), "--to", str(model), "--sign", str(private)]) == 0
    assert cli.main(["verify", str(model), "--trust", str(public)]) == 0
    assert "is signed by the trusted key" in capsys.readouterr().out
    path = model / "1" / "model.sig"
    verify = [sys.executable, "-m", "model_signing", "verify", "key", model / "1"]
    subprocess.run([*verify, "--signature", path, "--public_key", public], check=True, capture_output=True)

    text = model / "1" / "manifest.json"
    text.write_text(json.dumps(json.loads(text.read_text())))  # the same content in other bytes
    assert cli.main(["verify", str(model), "--trust", str(public)]) == 1
    assert "manifest.json is not the file that was signed" in capsys.readouterr().err
    path.unlink()
    assert cli.main(["verify", str(model), "--trust", str(public)]) == 1
    assert "is not signed, there is no model.sig" in capsys.readouterr().err


def test_a_server_refuses_what_is_not_signed(
    repository: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """With --strict it does not start."""
    assert cli.main(["serve", str(repository), "--port=0", "--strict", "--trust", str(keys[1])]) == 1
    assert "digits/1 is not signed, there is no model.sig" in capsys.readouterr().err


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_key_signs(form: str, version: Path, tmp_path: Path) -> None:
    """Whichever command of openssl made it."""
    private, public = make_keys(tmp_path, "key", *FORMS[form])
    signature.sign(version, signature.load_private(private))
    assert signature.read(version, signature.load_public(public)) == manifest.read(version)


def test_what_is_no_key_is_refused(keys: tuple[Path, Path], tmp_path: Path) -> None:
    """A missing file, something else, the wrong half of the pair, another kind; the sentence names the option."""
    private, public = keys
    rsa, rsa_public = make_keys(tmp_path, "rsa", "genpkey", "-algorithm", "rsa")
    curve, curve_public = make_keys(tmp_path, "curve", "ecparam", "-name", "secp256k1", "-genkey", "-noout")
    old, _ = make_keys(tmp_path, "old", "genpkey", "-algorithm", "ed25519")
    locked = tmp_path / "locked.pem"
    lock = ["openssl", "pkey", "-in", private, "-aes256", "-passout", "pass:secret", "-out", locked]
    subprocess.run(lock, check=True)
    nowhere = tmp_path / "nowhere"
    advice = (
        "is not an ECDSA key on P-256, P-384 or P-521; `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`"
    )
    for path, reason in (
        (nowhere, "cannot be read"),
        (public, "is not a private key in PEM without a password"),
        (locked, "is not a private key in PEM without a password"),
        (rsa, advice),
        (curve, advice),
        (old, advice),
    ):
        with pytest.raises(BadInput, match=f"^--sign {path} {reason}"):
            signature.load_private(path)
    advice = "is neither an ECDSA key on P-256, P-384 or P-521 nor an Ed25519 key; `openssl pkey -in KEY -pubout`"
    for path, reason in (
        (nowhere, "cannot be read"),
        (private, "is not a public key in PEM"),
        (rsa_public, advice),
        (curve_public, advice),
    ):
        with pytest.raises(BadInput, match=f"^--trust {path} {reason}"):
            signature.load_public(path)


def test_every_file_is_signed(version: Path) -> None:
    """The manifest, hidden files and an older signature too; without one of them, the version is refused."""
    key = ec.generate_private_key(ec.SECP256R1())
    sign_as_before(version, Ed25519PrivateKey.generate())
    (version / ".note").touch()
    signature.sign(version, key)
    signature.sign(version, key)  # again, which does not sign the first signature
    assert signature.read(version, key.public_key()) == manifest.read(version)
    for name in (".note", "manifest.sig"):
        (version / name).write_text("changed")
        assert refuse(version, key.public_key()) == f"{version / name} is not the file that was signed"
        (version / name).unlink()
        assert refuse(version, key.public_key()) == f"{str(version / name)!r} is missing, though it was signed"
        signature.sign(version, key)


def test_no_other_file_is_hashed(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the manifest lists is compared with it, and what nobody signed may be as large as it likes."""
    key = ec.generate_private_key(ec.SECP256R1())
    signature.sign(version, key)
    monkeypatch.setattr(files, "compute_hash", None)
    assert signature.read(version, key.public_key()) == manifest.read(version)
    (version / "large").touch()
    assert refuse(version, key.public_key()) == f"'{version / 'large'}' is not among the signed files"


def test_an_older_signature_is_read(version: Path) -> None:
    """With its own kind of key only, and only as it was signed."""
    key = Ed25519PrivateKey.generate()
    changed = f"{version} is not signed by the trusted key, or its manifest was changed since"
    assert refuse(version, key.public_key()) == f"{version} is not signed, there is no manifest.sig"
    sign_as_before(version, Ed25519PrivateKey.generate())
    assert refuse(version, key.public_key()) == changed
    sign_as_before(version, key)
    assert signature.read(version, key.public_key()) == manifest.read(version)
    with (version / "manifest.json").open("a") as file:
        file.write("\n")
    assert refuse(version, key.public_key()) == changed


def test_the_key_must_be_of_the_kind_of_the_signature(version: Path) -> None:
    """The sentence tells which one is there; a version can have both."""
    old, new = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
    sign_as_before(version, old)
    assert refuse(version, new.public_key()) == (
        f"{version} has no model.sig for an ECDSA key, only manifest.sig for an Ed25519 key; trust that key"
    )
    signature.sign(version, new)
    assert signature.read(version, old.public_key()) == signature.read(version, new.public_key())
    (version / "manifest.sig").unlink()
    assert refuse(version, old.public_key()) == (
        f"{version} has no manifest.sig for an Ed25519 key, only model.sig for an ECDSA key; trust that key"
    )


@pytest.mark.parametrize("name", ["model.sig", "manifest.sig"])
def test_a_signature_is_a_regular_file(name: str, version: Path) -> None:
    """A folder, a pipe, a link, or one to nowhere, is one sentence."""
    key = (
        ec.generate_private_key(ec.SECP256R1()) if name == "model.sig" else Ed25519PrivateKey.generate()
    ).public_key()
    path = version / name
    path.mkdir()
    assert refuse(version, key) == f"{path} cannot be read (Is a directory)"
    path.rmdir()
    os.mkfifo(path)
    assert refuse(version, key) == f"{path} cannot be read (not a regular file)"
    for target in (version / "model.onnx", version / "nowhere"):
        path.unlink()
        path.symlink_to(target)
        assert refuse(version, key) == f"{path} cannot be read (not a regular file)"
