"""manifest.json: what it must hold to be believed, and each way in which a version differs from it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from export import manifest
from resnet import BadInput
from tests.conftest import edit_manifest
from tests.versions import write_version


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """The folder of a version."""
    return write_version(tmp_path / "models" / "colors" / "1")


def test_what_was_written_is_read(version: Path) -> None:
    """Each field, as JSON for people that ends with a line; the digest is one that other languages can compute."""
    recorded = manifest.read(version)
    text = (version / "manifest.json").read_text()
    assert text.startswith('{\n  "format": 3,\n  "model": "colors",\n')
    assert text.endswith("}\n")
    content = json.loads(text)
    assert content["output"] == {"name": "probabilities", "dtype": "float32", "shape": [-1, 3]}
    assert content["preprocessing"] == {"color": "RGB", "resize": "bilinear"}
    assert recorded.labels == ["red", "green", "blue"]
    plain = json.dumps(content | {"digest": ""}, sort_keys=True, separators=(",", ":")).replace("1e-05", "0.00001")
    assert content["digest"] == recorded.digest == hashlib.sha256(plain.encode()).hexdigest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2, this version of resnet reads 3; export again"),
        ({"format": 4, "unknown": 1}, "has format 4, this version of resnet reads 3; export again"),
        ({"unknown": 1}, "is not a valid manifest (Object contains unknown field `unknown`); export the model again"),
        ({"version": 2}, "belongs to colors/2, not to colors/1; a version keeps its name"),
        ({"model": "shapes"}, "belongs to shapes/1, not to colors/1; a version keeps its name"),
        ({"labels": ["a", "b"]}, "names 2 labels for 3 outputs; export again"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(change: dict[str, Any], message: str, version: Path) -> None:
    """Even with the right digest; the sentence says what does not fit, and what to do."""
    edit_manifest(version, lambda content: content.update(change))
    with pytest.raises(BadInput) as caught:
        manifest.read(version)
    assert str(caught.value).startswith(f"{version / 'manifest.json'} {message}")


@pytest.mark.parametrize("change", [{"cpu": "another"}, {"digest": ""}, {"certificate": {"images": 7}}])
def test_an_edit_of_the_manifest_is_found(change: dict[str, Any], version: Path) -> None:
    """Whatever was edited, be it the digest itself."""

    def edit(content: dict[str, Any]) -> None:
        for name, value in change.items():
            content[name] = content[name] | value if isinstance(value, dict) else value

    edit_manifest(version, edit, forge=False)
    with pytest.raises(BadInput, match="manifest.json was edited: its digest differs from that of its content"):
        manifest.read(version)


def test_a_version_without_a_manifest_is_one_sentence(version: Path) -> None:
    """It names the file."""
    (version / "manifest.json").unlink()
    with pytest.raises(BadInput, match=r"1/manifest.json cannot be read \(No such file or directory\); export"):
        manifest.read(version)


@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 1), (5,), ()])
def test_an_output_of_another_shape_is_refused(shape: tuple[int, ...], version: Path) -> None:
    """Three classes need three probabilities for each image, however many images there are."""
    recorded = manifest.read(version)
    recorded.check_output((1, 3))
    recorded.check_output((5, 3))
    with pytest.raises(BadInput) as caught:
        recorded.check_output(shape)
    assert str(caught.value) == (f"colors/1 has 3 labels for an output of shape {list(shape)}; export the model again")


def test_every_file_is_hashed_but_the_manifest_and_the_signatures(version: Path) -> None:
    """Also those of folders inside; the hash is the SHA-256 of the content."""
    (version / "variables").mkdir()
    (version / "variables" / "data").write_bytes(b"weights")
    (version / "manifest.sig").touch()
    (version / "model.sig").touch()
    hashes = manifest.hash_files(version)
    assert list(hashes) == ["model.onnx", "reference.npz", "saved_model.pb", "variables/data"]
    assert hashes["variables/data"] == hashlib.sha256(b"weights").hexdigest()
    assert hashes["saved_model.pb"] == hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize("name", ["model.onnx", "reference.npz", "saved_model.pb"])
def test_each_difference_of_the_files_is_named(name: str, version: Path) -> None:
    """One clause for each file that was changed, added or removed; a file that was not touched has none."""
    recorded = manifest.read(version)
    assert list(manifest.changed_files(version, recorded)) == []
    path = version / name
    path.write_bytes(path.read_bytes() + b"x")
    changed = f"{path} is not the file that was exported (its SHA-256 differs)"
    assert list(manifest.changed_files(version, recorded)) == [changed]
    with pytest.raises(BadInput) as caught:
        manifest.read_file(version, name, recorded)
    assert str(caught.value) == f"{changed}; export the model again"
    (version / "extra").mkdir()
    (version / "extra" / "file").touch()
    path.unlink()
    assert list(manifest.changed_files(version, recorded)) == [
        f"{path} is missing",
        f"'{version / 'extra' / 'file'}' was added after the export, remove it",
    ]
    with pytest.raises(BadInput, match=rf"{name} cannot be read \(No such file or directory\); export the model again"):
        manifest.read_file(version, name, recorded)


def test_hidden_files_are_files_like_others(version: Path) -> None:
    """What the manifest does not name was added, and has no hash to hold."""
    (version / ".hidden").write_bytes(b"x")
    recorded = manifest.read(version)
    with pytest.raises(BadInput, match=r"\.hidden is not the file that was exported"):
        manifest.read_file(version, ".hidden", recorded)
    added = f"'{version / '.hidden'}' was added after the export, remove it"
    assert list(manifest.changed_files(version, recorded)) == [added]
    recorded.files[".hidden"] = hashlib.sha256(b"y").hexdigest()
    assert list(manifest.changed_files(version, recorded)) == [f"{version / '.hidden'} {manifest.CHANGED}"]


def test_a_folder_that_cannot_be_read_is_a_clause(version: Path) -> None:
    """It names what cannot be read, and why."""
    recorded = manifest.read(version)
    gone = version.with_name("2")
    assert list(manifest.changed_files(gone, recorded)) == [f"{gone} cannot be read (No such file or directory)"]


@pytest.mark.parametrize("count", [-1, 10**9 + 1, 10**400])
@pytest.mark.parametrize("name", ["images", "lost", "gained"])
def test_counts_that_nobody_has_are_refused(name: str, count: int, version: Path) -> None:
    """By their range, before anything is computed of them."""

    def edit(content: dict[str, Any]) -> None:
        certificate = content["certificate"]
        (certificate if name == "images" else certificate["variants"][0]["rows"][0])[name] = count

    edit_manifest(version, edit)
    with pytest.raises(
        BadInput, match=rf"is not a valid manifest \(Expected `int` .= -?\d+ - at .*\.{name}.*export the"
    ):
        manifest.read(version)
