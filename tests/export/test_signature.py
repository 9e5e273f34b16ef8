"""A signature vouches for a version; whoever demands one is not served without it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from export import signature
from resnet import BadInput, cli

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


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

    manifest = model / "1" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text())))  # the same content in other bytes
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
    """A missing file, something else, the wrong half of the pair, another kind."""
    private, public = keys
    other = tmp_path / "rsa.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "rsa", "-out", other], check=True, capture_output=True)
    for path, message in (
        (tmp_path / "nowhere", "cannot be read"),
        (public, "is not a private key in PEM"),
        (other, "is not an Ed25519 key"),
    ):
        with pytest.raises(BadInput, match=message):
            signature.load_private(path)
    with pytest.raises(BadInput, match="is not a public key in PEM"):
        signature.load_public(private)
