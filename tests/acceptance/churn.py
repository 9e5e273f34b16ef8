"""Change a model repository all the time, in every way, and check that the good model answers throughout.

Every tenth of a second something happens: a version is copied file by file, published by a rename, taken away or
labelled; links lead nowhere or in circles; pipes, files and folders appear where others are expected, under odd names;
folders may not be read. The server looks for changes every fifth of a second, and has no rights beyond those of the
files. Each answer must be of the version that it names. In the end the server must serve exactly the complete versions.
The last line of the output is one JSON object.

Examples:
  python -m tests.acceptance.churn demo/models --seconds 10
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.process import serve
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from resnet import CheckFailed, cli
from tests.acceptance.arguments import expect, parse
from tests.acceptance.footprint import Footprint
from tests.acceptance.messages import ModelUnderTest
from tests.acceptance.users import without_privileges
from tests.acceptance.versions import link, publish
from tests.acceptance.witness import Witness

GOOD = range(1, 5)  # versions that are prepared, and come and go
KEPT = 1  # never goes
PAUSE_SECONDS = 0.1
SETTLE_SECONDS = 30.0
MAX_MEGABYTES = 500  # of three versions, after many more were loaded
ODD_NAMES = (
    "002", "-rf", "a b", "ä", "new\nline", "\u2028", "x" * 255, "٣", "1.", ".hidden", "9" * 20, "b'", "$HOME",
)  # fmt: skip

Answers = dict[int, NDArray[np.float32]]


def main() -> None:
    """Change a repository under a server."""
    args = parse("churn", __doc__, seconds=(60.0, "seconds of changes"), seed=(0, "seed of the changes"))
    print(json.dumps(churn(args.repository, args.seconds, args.seed)))


def churn(source: Path, seconds: float, seed: int) -> dict[str, object]:
    """Change a repository under a server; return the number of changes and of answers.

    Raises:
        CheckFailed: The good model was not answered, or in the end not exactly the complete versions are served.
    """
    model = ModelUnderTest(source)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        prepared, served = Path(temporary) / "prepared" / model.name, Path(temporary) / "served" / model.name
        prepared.mkdir(parents=True)
        answers = {number: publish(model.folder, prepared / str(number))[:1] for number in GOOD}
        shutil.copytree(prepared / str(KEPT), served / str(KEPT), copy_function=link)
        changes = _Changes(prepared, served, random.Random(seed))
        options = ("--watch=0.2", "--no-tune", "--log-level=error")
        prefix = without_privileges()
        try:
            with serve(served.parent, *options, prefix=prefix) as server:
                address = server.address
                with Witness(address, model.classify(), answers) as witness:
                    end = time.monotonic() + seconds
                    while time.monotonic() < end:
                        counts[changes.make_one()] += 1
                        if changes.random.random() < 0.1:
                            server.signal(signal.SIGHUP)
                        time.sleep(PAUSE_SECONDS)
                    changes.settle()
                    _await(lambda: _list_ready(address), {model.name: changes.find_expected()})
                footprint = Footprint.read(server.pid)
                expect(
                    footprint.megabytes <= MAX_MEGABYTES,
                    f"the server holds {footprint.megabytes:.0f} MB, more than {MAX_MEGABYTES}",
                )
        finally:
            changes.clean()
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    return {"changes": counts.total(), "answers": witness.answered, **footprint._asdict()} | (
        {} if prefix or os.getuid() else {"SKIPPED": "folders that may not be read, for root without setpriv"}
    )


class _Changes:
    """Random changes of a model folder."""

    def __init__(self, prepared: Path, served: Path, choice: random.Random) -> None:
        self.random = choice
        self._prepared, self._served = prepared, served
        self._repository = served.parent
        self._number = 0
        self._copying: list[tuple[Path, Path]] = []  # what is left of a slow copy: from, to
        self._kinds: tuple[Callable[[], None], ...] = (
            self._copy_slowly, self._copy_slowly, self._copy_slowly,
            self._publish, self._remove, self._remove_slowly, self._label, self._link, self._put_pipe, self._put_file,
            self._name_oddly, self._forbid, self._break_manifest, self._clear,
        )  # fmt: skip

    def make_one(self) -> str:
        """Make a change, and return its name."""
        change = self.random.choice(self._kinds)
        with suppress(FileExistsError, FileNotFoundError, NotADirectoryError):
            change()
        return change.__name__.strip("_")

    def settle(self) -> None:
        """Finish what was begun, and leave some broken entries; version 2 arrives whole, and 3 file by file."""
        while self._copying:
            self._copy_next()
        for number in GOOD:
            if number != KEPT:
                shutil.rmtree(self._served / str(number), ignore_errors=True)
        self._link()
        self._put_pipe()
        self._name_oddly()
        self._forbid()
        shutil.copytree(self._prepared / "2", self._served / ".2", copy_function=link)
        (self._served / ".2").rename(self._served / "2")
        self._begin(3)
        while self._copying:
            self._copy_next()
            time.sleep(PAUSE_SECONDS)

    def find_expected(self) -> set[int]:
        """Return the versions that are served in the end: the latest, and those with a label."""
        labels = [self._served / name for name in ("stable", "canary")]
        labelled = {int(link_.readlink().name) for link_ in labels if link_.is_symlink() and link_.is_dir()}
        return {3} | labelled

    def clean(self) -> None:
        """Make all folders readable again, so that they can be removed."""
        for folder in (self._repository, self._served):
            for path in folder.iterdir():
                if not path.is_symlink() and path.is_dir():
                    path.chmod(0o755)

    def _copy_slowly(self) -> None:
        if self._copying:
            self._copy_next()
        else:
            self._begin(self.random.choice(GOOD[1:]))

    def _begin(self, number: int) -> None:
        source, target = self._prepared / str(number), self._served / str(number)
        target.mkdir()
        files = [path for path in source.rglob("*") if path.is_file()]
        self.random.shuffle(files)
        self._copying = [(path, target / path.relative_to(source)) for path in files]

    def _copy_next(self) -> None:
        source, target = self._copying.pop()
        with suppress(FileExistsError, FileNotFoundError, NotADirectoryError):
            target.parent.mkdir(parents=True, exist_ok=True)
            data = source.read_bytes()
            with target.open("wb") as file:  # half of it, for a moment
                file.write(data[: len(data) // 2])
                file.flush()
                time.sleep(PAUSE_SECONDS / 2)
                file.write(data[len(data) // 2 :])

    def _publish(self) -> None:
        number = self.random.choice(GOOD[1:])
        staged = self._served / f".staging-{number}"
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(self._prepared / str(number), staged, copy_function=link)
        with suppress(OSError):  # the version is there
            staged.rename(self._served / str(number))

    def _remove(self) -> None:
        number = self.random.choice(GOOD[1:])
        hidden = self._served / f".removed-{number}"
        shutil.rmtree(hidden, ignore_errors=True)
        (self._served / str(number)).rename(hidden)
        shutil.rmtree(hidden)

    def _remove_slowly(self) -> None:
        for path in sorted((self._served / str(self.random.choice(GOOD[1:]))).rglob("*"), reverse=True):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
            time.sleep(PAUSE_SECONDS / 10)

    def _label(self) -> None:
        name = self.random.choice(("stable", "canary"))
        part = self._served / ".staging-label"
        part.unlink(missing_ok=True)
        part.symlink_to(str(self.random.choice(GOOD)))
        part.replace(self._served / name)

    def _link(self) -> None:
        where = self.random.choice((self._repository, self._served))
        path = self._find_free(where)
        path.symlink_to(self.random.choice(("nowhere", path.name, "..", "/", "/etc/passwd", "/proc/self/root")))

    def _put_pipe(self) -> None:
        where = self.random.choice((self._repository, self._served, self._make_folder()))
        os.mkfifo(self._find_free(where) if where in (self._repository, self._served) else where / "manifest.json")

    def _put_file(self) -> None:
        self._find_free(self.random.choice((self._repository, self._served))).write_bytes(self.random.randbytes(100))

    def _name_oddly(self) -> None:
        folder = self.random.choice((self._repository, self._served)) / self.random.choice(ODD_NAMES)
        shutil.copytree(self._prepared / str(KEPT), folder, copy_function=link)

    def _forbid(self) -> None:
        folder = self.random.choice((self._make_folder(), self._find_free(self._repository)))
        folder.mkdir(exist_ok=True)
        (folder / "1").mkdir(exist_ok=True)
        folder.chmod(0)

    def _break_manifest(self) -> None:
        content = self.random.choice((b"", b"{", b"[" * 100_000, b'{"format": 1e999}', bytes(10**6)))
        (self._make_folder() / "manifest.json").write_bytes(content)

    def _clear(self) -> None:
        """Remove what is broken, so that it does not fill the folders."""
        self.clean()
        kept = {str(number) for number in GOOD} | {"stable", "canary"}
        for folder in (self._repository, self._served):
            for path in folder.iterdir():
                if path == self._served or (folder == self._served and path.name in kept):
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()

    def _make_folder(self) -> Path:
        """Make a version folder that has a number above those of the good ones."""
        folder = self._find_free(self._served)
        folder.mkdir()
        return folder

    def _find_free(self, folder: Path) -> Path:
        """Return a path that does not exist, under a number or a name."""
        self._number += 1
        return folder / (str(100 + self._number) if folder == self._served else f"model{self._number}")


def _list_ready(address: str) -> dict[str, set[int]]:
    """Return the versions that a server has ready, by model."""
    with grpc.insecure_channel(address) as channel:
        index = GRPCInferenceServiceStub(channel).RepositoryIndex(
            pb.RepositoryIndexRequest(ready=True), timeout=SETTLE_SECONDS
        )
    ready: dict[str, set[int]] = {}
    for entry in index.models:
        ready.setdefault(entry.name, set()).add(int(entry.version))
    return ready


def _await(read: Callable[[], dict[str, set[int]]], expected: dict[str, set[int]]) -> None:
    """Wait until what is read is as expected.

    Raises:
        CheckFailed: It is not within `SETTLE_SECONDS`.
    """
    end = time.monotonic() + SETTLE_SECONDS
    while (found := read()) != expected:
        if time.monotonic() > end:
            raise CheckFailed(f"{found} is served, {SETTLE_SECONDS:.0f} s after the last change; right is {expected}")
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
