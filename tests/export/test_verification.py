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

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from export import manifest, parity, reference, signature, triton
from export.certificate import Variant
from export.parity import BudgetError
from export.verification import verify
from resnet import BadInput, CheckFailed, cli
from tests.versions import list_file, make_graph, make_row, write_version


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


LABELS, ORDER = np.arange(6, dtype=np.int32) % 3, np.arange(6)
PIXELS, ANSWERS = np.zeros((6, 4, 4, 3), np.uint8), np.eye(3, dtype=np.float32)[LABELS]
ARRAYS = {"images": PIXELS, "labels": LABELS, "probabilities": ANSWERS, "by_class": ORDER}
SOUND = {name: to_npy(array) for name, array in ARRAYS.items()}
ARCHIVES: dict[str, bytes] = {
    "a pickle": pickle.dumps(Bomb()),
    "a pickle in the archive": pack(**SOUND | {"images": to_npy(np.array([Bomb()], object))}),
    "a pickle beside the arrays": pack(**SOUND, more=to_npy(np.array([Bomb()], object))),
    "a size that nobody has": pack(**SOUND | {"images": claim((1 << 50, 4, 4, 3))}),
    "other axes": pack(**SOUND | {"images": to_npy(np.zeros((6, 4), np.uint8))}),
    "other labels": pack(**SOUND | {"labels": to_npy(["a"] * 6)}),
    "a missing array": pack(images=SOUND["images"]),
    "no archive": b"PK\3\4",
    "nothing": b"",
}


def exact(variant: Variant) -> Variant:
    """Return a variant that is as often right as an original that is wrong on two images of six."""
    rows = [msgspec.structs.replace(make_row(size), accuracy=4 / 6) for size in parity.BATCH_SIZES]
    return msgspec.structs.replace(variant, rows=rows)


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_hostile_reference_is_one_sentence(
    kind: str, version: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No code of theirs runs."""
    monkeypatch.chdir(version.parent)
    list_file(version, reference.NAME, ARCHIVES[kind])
    assert cli.main(["verify", str(version.parent)]) == 2
    assert f"{version / reference.NAME} " in capsys.readouterr().err
    assert not Path("exploded").exists()


def test_a_zip_bomb_is_not_unpacked(
    version: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names its size beforehand."""
    sizes = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 1000}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    list_file(version, reference.NAME, pack(**SOUND | {"images": to_npy(np.zeros((100_000, 4, 4, 3), np.uint8))}))
    monkeypatch.setattr(np, "load", None)
    assert cli.main(["verify", str(version.parent)]) == 2
    assert "unpacks to 0.0048 GB, more than the 0.001 GB of memory of this machine" in capsys.readouterr().err


def test_a_version_is_verified_where_nothing_but_onnxruntime_is_installed(version: Path) -> None:
    """Neither TensorFlow, Keras, onnx nor rich; what only --full runs is said."""
    code = """
import sys
for name in ("tensorflow", "keras", "onnx", "rich"):
    sys.modules[name] = None
from resnet import cli
sys.exit(cli.main(["verify", sys.argv[1]]))
"""
    done = subprocess.run([sys.executable, "-c", code, version.parent], capture_output=True, text=True, check=True)
    note, verified = done.stdout.splitlines()[-2:]
    assert note == "compared with the recorded answers of the Keras original; --full runs it, and the SavedModel"
    assert verified == "colors/1 is verified"


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (make_graph(5).SerializeToString(), r"returns 'probabilities' \(float32 \[-1, 5\]\), its manifest says"),
        (b"", "takes nothing, its manifest says 'image'"),
        (b"\xff" * 1000, "is not an ONNX file"),
    ],
)
def test_another_graph_with_its_own_hash_is_found(graph: bytes, message: str, version: Path) -> None:
    """Before it is loaded."""
    list_file(version, "model.onnx", graph)
    with pytest.raises(CheckFailed, match=rf"model\.onnx {message}"):
        verify(version)


def test_a_graph_that_onnxruntime_cannot_load_is_one_sentence(version: Path) -> None:
    """Though it says that it is one of the version."""
    graph = make_graph()
    graph.graph.node[0].op_type = "Unheard"
    list_file(version, "model.onnx", graph.SerializeToString())
    with pytest.raises(BadInput, match=r"model\.onnx cannot be loaded by onnxruntime: "):
        verify(version)


def test_another_model_with_its_own_hash_is_found(version: Path) -> None:
    """It gives other answers than the original."""
    graph = make_graph()
    graph.graph.initializer[0].raw_data = (-np.eye(3, dtype=np.float32)).tobytes()
    list_file(version, "model.onnx", graph.SerializeToString())
    with pytest.raises(BudgetError, match="the largest difference of onnx at batch size 1 is 1, above 1e-05; "):
        verify(version)


def test_other_images_with_their_own_hash_are_found(version: Path) -> None:
    """The certificate is about those that it was made with."""
    list_file(version, reference.NAME, pack(**SOUND))
    message = "the certificate is about other held-out images than those of .*reference.npz"
    with pytest.raises(CheckFailed, match=message):
        verify(version)


def test_other_answers_of_the_original_are_found(version: Path) -> None:
    """By their accuracy before anything is run; those of the same accuracy by what the ONNX files answer."""
    stored = reference.load(version, manifest.read(version))
    swapped, surer = stored.probabilities[::-1].copy(), stored.probabilities.copy()
    surer[0] = [0.5, 0.3, 0.2]
    for answers, error, message in (
        (swapped, CheckFailed, "an accuracy of 100.00%, but its answers in .*reference.npz have one of 33.33%"),
        (surer, BudgetError, "the largest difference of onnx at batch size 1 is 0.5, above 1e-05"),
    ):
        other = version / "other.npz"
        stored._replace(probabilities=answers).write(other)
        list_file(version, reference.NAME, other.read_bytes())
        other.unlink()
        with pytest.raises(error, match=message):
            verify(version)


def test_a_certificate_of_another_model_is_found(version: Path, tmp_path: Path) -> None:
    """Its name, its images and its digest are right."""
    other = write_version(tmp_path / "others" / "colors" / "1")
    figures = manifest.read(other).certificate
    lost = [
        msgspec.structs.replace(variant, rows=[make_row(size, 4 / 6) for size in parity.BATCH_SIZES])
        for variant in figures.variants
    ]
    for accuracy, variants, message in (
        (4 / 6, figures.variants, "contradict each other"),
        (
            4 / 6,
            [exact(variant) for variant in figures.variants],
            "an accuracy of 66.67%, but its answers .* of 100.00%",
        ),
        (1.0, lost, "gives onnx at batch size 1 an accuracy of 66.67%, but it is 100.00%"),
    ):
        certificate = msgspec.structs.replace(figures, accuracy=accuracy, variants=variants)
        msgspec.structs.replace(manifest.read(version), certificate=certificate).write(version)
        with pytest.raises(CheckFailed, match=message):
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
    "content", [b"", b"{", b"[" * 100_000, b'{"format": 3}', b'{"format": "\xff"}', b'{"format": 1e400}', b"\0" * 99]
)
def test_what_is_no_manifest_is_one_sentence(content: bytes, version: Path) -> None:
    """However deep or strangely it is written."""
    (version / manifest.NAME).write_bytes(content)
    with pytest.raises(BadInput, match="manifest.json is not a valid manifest"):
        manifest.read(version)
