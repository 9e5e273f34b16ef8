"""Files of a version: nothing blocks a reader, nothing leads elsewhere, and what is loaded is what was hashed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from export import files, manifest
from resnet import BadInput
from tests.versions import write_version


def make_socket(path: Path) -> None:
    """Put a socket there."""
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.fsencode(path.relative_to(Path.cwd())))


IRREGULAR: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a socket": make_socket,
    "a folder": Path.mkdir,
    "a link to a file": lambda path: path.symlink_to("/etc/hostname"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """The folder of a version."""
    return write_version(tmp_path / "models" / "colors" / "1")


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(
    kind: str, name: str, version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe without a writer would block, a device never end, a link lead out of the folder."""
    monkeypatch.chdir(version)  # the path of a socket must be short
    (version / name).unlink()
    IRREGULAR[kind](version / name)
    reason = "Is a directory" if kind == "a folder" else "not a regular file"
    with pytest.raises(OSError, match=reason):
        files.read(version / name)
    with pytest.raises(OSError, match=reason):
        files.compute_hash(version / name)
    with pytest.raises(BadInput, match=rf"{name} cannot be read \({reason}\)"):
        raise BadInput(*manifest.changed_files(version, manifest.read(version)))


@pytest.mark.parametrize("kind", ["a pipe", "a link to a file", "a link to a device"])
def test_whatever_was_added_is_named(kind: str, version: Path) -> None:
    """TensorFlow Serving, for one, would take more files than the manifest lists."""
    (version / "assets").mkdir()
    IRREGULAR[kind](version / "assets" / "weights\n")
    (problem,) = manifest.changed_files(version, manifest.read(version))
    assert problem == f"'{version}/assets/weights\\n' was added after the export, remove it"


def test_hidden_files_were_added_too_and_empty_folders_do_no_harm(version: Path) -> None:
    """A loader may read what a person does not see."""
    (version / "assets" / ".idea").mkdir(parents=True)
    recorded = manifest.read(version)
    assert not list(manifest.changed_files(version, recorded))
    for name in (".DS_Store", "assets/.idea/workspace.xml"):
        (version / name).touch()
    assert list(manifest.changed_files(version, recorded)) == [
        f"'{version}/{name}' was added after the export, remove it"
        for name in (".DS_Store", "assets/.idea/workspace.xml")
    ]


@pytest.mark.parametrize("name", ["/etc/hostname", "../2/model.onnx", "sub/../model.onnx", "./model.onnx", "", "a\0b"])
def test_a_manifest_lists_files_of_its_own_folder_only(name: str, version: Path) -> None:
    """Whatever there is at such a path."""
    write_version(version.with_name("2"))
    recorded = manifest.read(version)
    recorded.files[name] = recorded.files["model.onnx"]
    assert list(manifest.changed_files(version, recorded)) == [f"{version / name} is missing"]


def test_a_file_that_changes_between_hash_and_load_is_refused(version: Path) -> None:
    """What is returned is what was hashed; later content of the same name is not."""
    recorded = manifest.read(version)
    assert not list(manifest.changed_files(version, recorded))
    content = manifest.read_file(version, "model.onnx", recorded)
    (version / "model.onnx").write_bytes(content + b"x")
    with pytest.raises(BadInput, match="model.onnx is not the file that was exported"):
        manifest.read_file(version, "model.onnx", recorded)


def test_a_fingerprint_changes_with_anything_in_the_folder(version: Path) -> None:
    """Names, content, times, permissions, and files that were exchanged; reading changes nothing."""
    (version / "sub").mkdir()
    seen = [files.fingerprint(version)]
    path = version / "model.onnx"
    status = path.stat()

    def exchange() -> None:
        (version / "sub" / "x").write_bytes(path.read_bytes())
        os.utime(version / "sub" / "x", ns=(status.st_atime_ns, status.st_mtime_ns))
        (version / "sub" / "x").rename(path)

    def rewrite() -> None:
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    for change in (
        rewrite,
        (version / "sub" / "new").touch,
        lambda: path.write_bytes(path.read_bytes()[:-1]),
        lambda: path.chmod(0o600),
        exchange,
        lambda: os.utime(path, ns=(0, 0)),
        lambda: version.rename(version.with_name("2")),
    ):
        change()
        seen.append(files.fingerprint(version))
    assert len(set(seen)) == len(seen)
    before = files.fingerprint(version.with_name("2"))
    (version.with_name("2") / "model.onnx").read_bytes()
    assert files.fingerprint(version.with_name("2")) == before


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: the old content stays, and no half of the new."""
    path = tmp_path / "labels.txt"
    files.write(path, b"old")

    def fill(part: Path, content: bytes) -> None:
        with part.open("wb") as file:
            file.write(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(OSError, match="No space left"):
        files.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_was_never_begun_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no file can be made any more: there is nothing to remove then, which is no error of its own."""

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError, match="No space left"):
        files.write(tmp_path / "labels.txt", b"new")
    assert not list(tmp_path.iterdir())


def test_a_fingerprint_is_that_of_the_folder_too(version: Path) -> None:
    """Its own times count, though nothing in it has changed."""
    before = files.fingerprint(version)
    os.utime(version, ns=(0, 0))
    assert files.fingerprint(version) != before


def test_a_folder_that_cannot_be_listed_is_an_error(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that nobody sees are not files that are not there."""
    (version / "variables").mkdir()
    scan = os.scandir

    def refuse(path: str | Path) -> object:
        if Path(path).name == "variables":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="variables"):
        files.list_entries(version)
    assert files.fingerprint(version) == 13
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.list_entries(version / "nowhere")
