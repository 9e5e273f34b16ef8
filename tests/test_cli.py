"""What the command line makes of errors: a sentence, an exit code, and for a bug the file with its traceback."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resnet import BadInput, cli
from resnet.files import read_file

RESNET = [sys.executable, "-m", "resnet"]
Break = Callable[[BaseException], None]


@pytest.fixture
def break_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Break:
    """Makes `resnet family` raise; tracebacks go to a folder of the test's own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def break_with(error: BaseException) -> None:
        def run(_: Any) -> None:
            raise error

        monkeypatch.setattr("training.commands.family.run", run)

    return break_with


def test_a_bug_is_a_sentence_and_its_traceback_a_file(
    break_family: Break, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For the user's eyes only; the sentence says where it is and where to report it."""
    break_family(KeyError("colour"))
    assert cli.main(["family"]) == 70
    error = capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    report = f"please report it in the project's issue tracker, with {file}"
    assert error == f"resnet family: this is a bug (KeyError: 'colour'); {report}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "raise error" in file.read_text()


def test_a_bug_is_a_sentence_where_no_file_can_be_written(
    break_family: Break, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It says how to see the traceback."""
    break_family(RecursionError("deep"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no"))
    assert cli.main(["family"]) == 70
    assert "(RecursionError: deep); please report it" in (error := capsys.readouterr().err)
    assert "--debug shows" in error


@pytest.mark.parametrize("arguments", [["--debug", "family"], ["family", "--debug"]])
def test_debug_shows_the_traceback(
    arguments: list[str], break_family: Break, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before or after the command, of bad input too; the sentence comes last."""
    break_family(BadInput("no such colour"))
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "resnet family: no such colour"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 2, "there is not enough memory"),
        (PermissionError(13, "Permission denied", "models"), 2, "models: Permission denied"),
        (OSError(28, "No space left on device"), 2, "No space left on device; free some, or write to another place"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_is_no_bug_has_its_own_sentence(
    error: BaseException,
    code: int,
    message: str,
    break_family: Break,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """No traceback is saved."""
    break_family(error)
    assert cli.main(["family"]) == code
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_reader_who_leaves_is_no_error() -> None:
    """As `head` does: nothing is said, and the exit code is that of SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*RESNET, "models", "schema"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_cannot_be_written_is_a_sentence() -> None:
    """Also that which is buffered until the end."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*RESNET, "models", "schema"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "No space left on device" in done.stderr


def test_names_that_the_terminal_cannot_show_are_escaped(tmp_path: Path) -> None:
    """Here one that is not UTF-8, in an ASCII locale."""
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    done = subprocess.run(
        [*RESNET, "classify", path],
        capture_output=True,
        check=False,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    assert done.returncode == 2
    assert re.search(rb"caf\\udce9.png cannot be read", done.stderr)
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    """Paths that are no file to read, by what they are."""
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "text").write_bytes(b"\xff\xfe\n")
    names = {name: str(tmp_path / name) for name in ("folder", "pipe", "loop", "text", "missing")}
    return names | {"device": "/dev/null", "long": "x" * 5000, "inside a file": str(tmp_path / "text" / "file")}


@pytest.mark.parametrize(
    "command",
    [
        "classify {} --server 127.0.0.1:9",
        "classify x --tls-ca {}",
        "classify x --token-file {}",
        "load 127.0.0.1:9 --token-file {}",
        "serve --config {}",
        "serve {} --strict",
        "verify {}",
        "models list {}",
        "models show {}",
        "tune {}",
        pytest.param("train --out out --data {}", marks=pytest.mark.slow),  # loads TensorFlow
    ],
)
def test_a_path_that_is_no_such_file_is_one_sentence(
    command: str,
    paths: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pipe is not waited for, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for kind, path in paths.items():
        assert cli.main([word.format(path) for word in command.split()]) in (1, 2), kind
        assert len(capsys.readouterr().err.splitlines()) == 1, kind
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("folder", "is a folder; name a file"),
        ("pipe", "not a regular file"),
        ("device", "not a regular file"),
        ("missing", "cannot be read"),
        ("loop", "cannot be read"),
        ("long", "cannot be read"),
    ],
)
def test_only_regular_files_are_read(kind: str, message: str, paths: dict[str, str], tmp_path: Path) -> None:
    """Also through a link."""
    with pytest.raises(BadInput, match=message):
        read_file(Path(paths[kind]))
    (tmp_path / "link").symlink_to(tmp_path / "text")
    assert read_file(tmp_path / "link") == b"\xff\xfe\n"
    with pytest.raises(BadInput, match="is no path"):
        read_file(Path("a\0b"))
