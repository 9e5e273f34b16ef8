"""A signature vouches for a version; whoever demands one is not served without it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export import manifest, signature
from resnet import BadInput, CheckFailed, cli
from tests.versions import write_version

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public one, as openssl writes them."""
    private, public = tmp_path / "key.pem", tmp_path / "public.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


def test_an_export_is_signed_and_verified(
    run: Path, keys: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By us and by openssl; one changed byte of the manifest, or no signature, is one sentence."""
    private, public = keys
    model = tmp_path / "models" / "digits"
    assert cli.main(["export", str(run), "--to", str(model), "--sign", str(private)]) == 0
    assert cli.main(["verify", str(model), "--trust", str(public)]) == 0
    assert "is signed by the trusted key" in capsys.readouterr().out
    checked = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin"]
    files = ["-in", model / "1" / "manifest.json", "-sigfile", model / "1" / "manifest.sig"]
    subprocess.run([*checked, *files], check=True, capture_output=True)

    text = model / "1" / "manifest.json"
    text.write_text(json.dumps(json.loads(text.read_text())))  # the same content in other bytes
    assert cli.main(["verify", str(model), "--trust", str(public)]) == 1
    assert "is not signed by the trusted key, or its manifest was changed since" in capsys.readouterr().err
    (model / "1" / "manifest.sig").unlink()
    assert cli.main(["verify", str(model), "--trust", str(public)]) == 1
    assert "is not signed, there is no manifest.sig" in capsys.readouterr().err


def test_a_server_refuses_what_is_not_signed(
    repository: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """With --strict it does not start."""
    assert cli.main(["serve", str(repository), "--port=0", "--strict", "--trust", str(keys[1])]) == 1
    assert "digits/1 is not signed, there is no manifest.sig" in capsys.readouterr().err


def test_what_is_no_key_is_refused(keys: tuple[Path, Path], tmp_path: Path) -> None:
    """A missing file, something else, the wrong half of the pair, another kind; the sentence names the option."""
    private, public = keys
    rsa, rsa_public = tmp_path / "rsa.pem", tmp_path / "rsa-public.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "rsa", "-out", rsa], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", rsa, "-pubout", "-out", rsa_public], check=True)
    nowhere = tmp_path / "nowhere"
    for path, reason in (
        (nowhere, "cannot be read"),
        (public, "is not a private key in PEM"),
        (rsa, "is not an Ed25519 key; `openssl genpkey"),
    ):
        with pytest.raises(BadInput, match=f"^--sign {path} {reason}"):
            signature.load_private(path)
    for path, reason in (
        (nowhere, "cannot be read"),
        (private, "is not a public key in PEM"),
        (rsa_public, "is not an Ed25519 key; `openssl pkey"),
    ):
        with pytest.raises(BadInput, match=f"^--trust {path} {reason}"):
            signature.load_public(path)


def test_a_manifest_is_read_after_its_signature(keys: tuple[Path, Path], tmp_path: Path) -> None:
    """Of the trusted key only, and only as it was signed."""
    version = write_version(tmp_path / "models" / "colors" / "1")
    path = version / manifest.SIGNATURE
    private, public = signature.load_private(keys[0]), signature.load_public(keys[1])

    def refuse(reason: str) -> None:
        with pytest.raises(CheckFailed) as caught:
            signature.read(version, public)
        assert str(caught.value) == reason

    refuse(f"{version} is not signed, there is no manifest.sig")
    signature.sign(version, Ed25519PrivateKey.generate())
    refuse(f"{version} is not signed by the trusted key, or its manifest was changed since")
    signature.sign(version, private)
    assert len(path.read_bytes()) == 64
    assert signature.read(version, public) == manifest.read(version)
    manifest.read(version).write(version)  # the same bytes
    assert signature.read(version, public) == manifest.read(version)
    with (version / manifest.NAME).open("a") as file:
        file.write("\n")
    refuse(f"{version} is not signed by the trusted key, or its manifest was changed since")
    path.unlink()
    path.mkdir()
    refuse(f"{path} cannot be read (Is a directory)")
