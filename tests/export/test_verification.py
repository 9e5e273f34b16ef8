"""`resnet verify`: nothing of a version runs before its signature and hashes hold, and by default only ONNX."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from export import heldout, manifest, signature, triton
from export.verification import verify
from resnet import BadInput, CheckFailed, cli
from tests.versions import list_file, make_graph, write_version


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """The folder of a version; its SavedModel is empty, its Keras original missing."""
    return write_version(tmp_path / "models" / "colors" / "1")


class Bomb:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.mkdir, ("exploded",)  # type: ignore[return-value]


def pack(**members: bytes) -> bytes:
    """Return a ZIP archive of .npy files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def to_npy(value: object) -> bytes:
    """Return a .npy file, pickled where it must be."""
    file = io.BytesIO()
    np.save(file, np.asarray(value), allow_pickle=True)
    return file.getvalue()


def claim(shape: tuple[int, ...]) -> bytes:
    """Return a .npy file whose header claims more than follows."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


LABELS = to_npy(np.zeros(6, np.int32))
ARCHIVES: dict[str, bytes] = {
    "a pickle": pickle.dumps(Bomb()),
    "a pickle in the archive": pack(images=to_npy(np.array([Bomb()], object)), labels=LABELS),
    "a size that nobody has": pack(images=claim((1 << 50, 4, 4, 3)), labels=LABELS),
    "other axes": pack(images=to_npy(np.zeros((6, 4), np.uint8)), labels=LABELS),
    "other labels": pack(images=to_npy(np.zeros((6, 4, 4, 3), np.uint8)), labels=to_npy(["a"] * 6)),
    "a missing array": pack(images=to_npy(np.zeros((6, 4, 4, 3), np.uint8))),
    "no archive": b"PK\3\4",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_hostile_images_are_one_sentence(
    kind: str, version: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No code of theirs runs."""
    monkeypatch.chdir(version.parent)
    list_file(version, heldout.NAME, ARCHIVES[kind])
    assert cli.main(["verify", str(version.parent)]) == 2
    assert f"{version / heldout.NAME} " in capsys.readouterr().err
    assert not Path("exploded").exists()


def test_a_zip_bomb_is_not_unpacked(
    version: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names its size beforehand."""
    sizes = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 1000}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    list_file(version, heldout.NAME, pack(images=to_npy(np.zeros((100_000, 4, 4, 3), np.uint8)), labels=LABELS))
    monkeypatch.setattr(np, "load", None)
    assert cli.main(["verify", str(version.parent)]) == 2
    assert "unpacks to 0.0048 GB, more than the 0.001 GB of memory of this machine" in capsys.readouterr().err


def test_an_unsigned_version_is_verified_without_its_code(version: Path) -> None:
    """Neither TensorFlow nor Keras is loaded."""
    code = """
import sys
from resnet import cli
assert cli.main(["verify", sys.argv[1]]) == 0
print([name for name in ("tensorflow", "keras") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code, version.parent], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "the ONNX files have the recorded accuracy; --full compares them with the Keras original" in done.stdout
    assert "colors/1 is verified" in done.stdout


@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [
        (make_graph(5).SerializeToString(), CheckFailed, "^onnx: the model cannot be run: colors/1 has 3 labels"),
        (b"", BadInput, "model.onnx cannot be loaded by onnxruntime"),
        (b"\xff" * 1000, BadInput, "model.onnx cannot be loaded by onnxruntime"),
    ],
)
def test_another_graph_with_its_own_hash_is_found(
    graph: bytes, error: type[Exception], message: str, version: Path
) -> None:
    """By what it computes, or that it does not."""
    list_file(version, "model.onnx", graph)
    with pytest.raises(error, match=message):
        verify(version)


def test_another_model_with_its_own_hash_is_found(version: Path) -> None:
    """It gives another accuracy than the certificate says."""
    graph = make_graph()
    graph.graph.initializer[0].raw_data = (-np.eye(3, dtype=np.float32)).tobytes()
    list_file(version, "model.onnx", graph.SerializeToString())
    with pytest.raises(CheckFailed, match="accuracy of 100.00%, but it is 0.00%"):
        verify(version)


def test_other_images_with_their_own_hash_are_found(version: Path) -> None:
    """The certificate is about those that it was made with."""
    list_file(version, heldout.NAME, pack(images=to_npy(np.ones((6, 4, 4, 3), np.uint8)), labels=LABELS))
    with pytest.raises(CheckFailed, match="the certificate is about other held-out images"):
        verify(version)


def test_what_triton_reads_is_verified(version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It follows from the manifest of each version; without these files there is nothing to verify."""
    model = version.parent
    assert cli.main(["verify", str(model)]) == 0
    triton.write_files(manifest.read(version), model)
    write_version(model / "2")
    assert cli.main(["models", "verify", str(model)]) == 0
    (model / "labels.txt").write_text("blue\ngreen\nred\n")
    assert cli.main(["verify", str(model)]) == 1
    assert "labels.txt, which Triton reads, is not the file that was exported" in capsys.readouterr().err
    (model / "labels.txt").unlink()
    os.mkfifo(model / "labels.txt")
    assert cli.main(["verify", str(model)]) == 1
    assert "labels.txt cannot be read (not a regular file)" in capsys.readouterr().err


def test_a_signature_covers_the_text_that_is_used(version: Path) -> None:
    """A pipe could show the signed text first and another one afterwards; the text is read once, from a file."""
    key = ec.generate_private_key(ec.SECP256R1())
    signature.sign(version, key)
    assert signature.read(version, key.public_key()) == manifest.read(version)
    path = version / manifest.NAME
    signed = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR)  # both ends of it, so that nothing waits
    os.write(pipe, signed)
    with pytest.raises(BadInput, match="not a regular file"):
        signature.read(version, key.public_key())
    os.close(pipe)


def test_the_manifest_is_read_once(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the signature covers is what is parsed, whatever the file holds by then."""
    key = ec.generate_private_key(ec.SECP256R1())
    signature.sign(version, key)
    expected = manifest.read(version)
    read = manifest.read_content

    def exchange(folder: Path) -> bytes:
        content = read(folder)
        (folder / manifest.NAME).write_text("{}")
        return content

    monkeypatch.setattr(manifest, "read_content", exchange)
    assert signature.read(version, key.public_key()) == expected


def test_the_signature_comes_before_everything_else(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the text of the manifest is parsed before."""
    signature.sign(version, ec.generate_private_key(ec.SECP256R1()))
    monkeypatch.setattr(manifest, "parse", None)
    with pytest.raises(CheckFailed, match="is by another key than the trusted one"):
        verify(version, ec.generate_private_key(ec.SECP256R1()).public_key(), full=True)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b'{"format": 2}', b'{"format": "\xff"}', b'{"format": 1e400}', b"\0" * 99]
)
def test_what_is_no_manifest_is_one_sentence(content: bytes, version: Path) -> None:
    """However deep or strangely it is written."""
    (version / manifest.NAME).write_bytes(content)
    with pytest.raises(BadInput, match="manifest.json is not a valid manifest"):
        manifest.read(version)
