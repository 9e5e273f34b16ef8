"""Upload versions to object storage under load, with every fault of networks and clouds, and check that nobody notices.

An S3 server runs behind a proxy that cuts, shortens and changes downloads, and answers 503, 403 or nothing. Two servers
of one cache serve three models from there, while a witness for each model compares each answer with what the version
that it names computes. Versions are uploaded in order, file by file, manifest first, in part, and with wrong files, and
are removed; a server is started while the storage is down, and one whose disk is too small. The table shows which
version answered before and after each step, after how many seconds, and how many requests were answered meanwhile; none
may fail. The last line of the output is one JSON object.

Examples:
  python -m tests.acceptance.storage demo/models --versions 20
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.process import ServerProcess, serve
from export import manifest
from resnet import CheckFailed, cli
from resnet.storage import StorageFolder
from resnet.table import render
from serving.client import Client
from tests.acceptance.arguments import expect, parse
from tests.acceptance.messages import ModelUnderTest
from tests.acceptance.s3 import Fault, FaultyStorage, StorageRequest, start_storage
from tests.acceptance.versions import publish
from tests.acceptance.witness import Witness
from tests.conftest import edit_manifest
from tests.remote import take_away, upload

URL = "s3://bucket/models"
NAMES = ("digits", "second", "third")
PATIENCE_SECONDS = 60.0
FIRST = 11  # versions of the first model: one at the start, and those of the steps
LOOKS = 3  # of a server, after which what it does not serve it will not
HEADER = ("step", "model", "before", "after", "seconds", "answers")
FAULTS: tuple[tuple[str, Fault, str, int], ...] = (
    ("downloads are cut", "cut", "model.onnx", 2),
    ("downloads are too short", "short", "model.onnx", 2),
    ("downloads are changed", "changed", "model.onnx", 2),
    ("503 to all requests", "busy", "", 8),
    ("the token has expired", "expired", "", 6),
    ("no answer", "down", "", 8),
)  # what it is, the fault, the files that have it, and the number of downloads


def main() -> None:
    """Upload, and compare."""
    args = parse("storage", __doc__, versions=(20, "versions of all models, at least 14"))
    model = ModelUnderTest(args.repository)
    with tempfile.TemporaryDirectory() as folder, start_storage() as storage:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        site = StorageSite(storage, model, Path(folder), args.versions)
        for name in NAMES:
            site.upload(site.take(name))
        with site.run():
            check_faults(site)
            check_uploads(site)
            for version in site.left:
                with site.step("an upload", version.parent.name):
                    site.upload(version)
        skipped = check_starts(site, Path(folder))
    print(render(HEADER, site.rows, left=2))
    figures = {"versions": args.versions, "steps": len(site.rows), "answers": site.answered, "failed": 0}
    print(json.dumps(figures | ({"SKIPPED": skipped} if skipped else {})))


class StorageSite:
    """Two servers of the storage, and their callers.

    Attributes:
        left: The versions that were made, and are not taken yet.
        rows: Of the table.
        storage: The storage.
    """

    def __init__(self, storage: FaultyStorage, model: ModelUnderTest, folder: Path, versions: int) -> None:
        """Make the versions; see `run` for the rest."""
        self.storage, self.rows = storage, list[list[str]]()
        self._model = model
        self._served = dict.fromkeys(NAMES, 0)
        others = (NAMES[1 + turn % 2] for turn in range(versions - FIRST))
        self._answers: dict[str, dict[int, NDArray[np.float32]]] = {name: {} for name in NAMES}
        self.left = [self._make(folder / name) for name in (*[NAMES[0]] * FIRST, *others)]
        self._servers: list[ServerProcess] = []
        self._witnesses: list[Witness] = []

    @property
    def answered(self) -> int:
        """Requests that were answered as they should."""
        return sum(witness.answered for witness in self._witnesses)

    def take(self, name: str) -> Path:
        """Return the folder of the next version of a model."""
        version = next(version for version in self.left if version.parent.name == name)
        self.left.remove(version)
        return version

    def upload(self, version: Path) -> None:
        """Upload a version as an export does; it is to be served from then on."""
        upload(version, URL)
        self.serves(version)

    @contextmanager
    def run(self) -> Iterator[None]:
        """Run the servers and their callers."""
        with ExitStack() as stack:
            for _ in range(2):
                self._servers.append(stack.enter_context(serve(URL, "--watch=0.2", "--no-tune")))
            for server in self._servers:
                for name in NAMES:
                    request = self._model.classify(name=name)
                    witness = Witness(server.address, request, self._answers[name], pause=0.005)
                    self._witnesses.append(stack.enter_context(witness))
            yield

    @contextmanager
    def step(self, title: str, name: str = NAMES[0]) -> Iterator[str]:
        """Do a step in the block, wait until the servers have looked and serve what they should, and add a row."""
        before, answered, started = self._served[name], self.answered, time.monotonic()
        yield name
        self.wait(lambda: all(self.find_version(server, name) == self._served[name] for server in self._servers))
        seconds = time.monotonic() - started
        self.look()
        for server in self._servers:
            found = self.find_version(server, name)
            expect(found == self._served[name], f"{title}: version {found} is served, not {self._served[name]}")
        after = str(self._served[name])
        self.rows.append([title, name, str(before), after, f"{seconds:.1f}", f"{self.answered - answered:,}"])

    def look(self) -> None:
        """Wait until every server has looked at the storage a few times more."""
        seen = self._count_looks()
        self.wait(lambda: self._count_looks() >= seen + (LOOKS + 1) * len(self._servers))

    def serves(self, version: Path) -> None:
        """Note that a version is to be served from now on."""
        self._served[version.parent.name] = int(version.name)

    def hang_up(self) -> None:
        """Have the servers look anew at what they refused."""
        for server in self._servers:
            server.signal(signal.SIGHUP)

    def find_version(self, server: ServerProcess, name: str) -> int:
        """Return the version of a model that a server answers with."""
        with Client(server.address) as client:
            return client.classify(self._model.pixels[:1], model=name).version

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so.

        Raises:
            CheckFailed: It is not, in time.
        """
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > end:
                errors = "".join(line for server in self._servers for line in server.errors[-3:])
                raise CheckFailed(f"the servers do not serve {self._served} within {PATIENCE_SECONDS:g} s: {errors}")
            time.sleep(0.05)

    def _make(self, model: Path) -> Path:
        model.mkdir(exist_ok=True)
        answers = self._answers[model.name]
        version = model / str(len(answers) + 1)
        answers[int(version.name)] = publish(self._model.folder, version)[:1]
        return version

    def _count_looks(self) -> int:
        return sum(count for request, count in self.storage.requests.items() if "list-type" in request.path)


def check_faults(site: StorageSite) -> None:
    """Upload versions whose downloads fail."""
    for title, fault, part, count in FAULTS:
        with site.step(title) as name:
            version = site.take(name)
            site.storage.fault = _limit(fault, part, count)
            site.upload(version)


def check_uploads(site: StorageSite) -> None:
    """Upload versions in other ways than an export does, and take them away."""
    storage = StorageFolder(URL)
    for title, first in (("file by file", "labels.txt"), ("manifest first", manifest.NAME)):
        with site.step(title) as name:
            version = site.take(name)
            for file in sorted(_list_files(version), key=lambda file: (file != first, file == manifest.NAME)):
                storage.upload({f"{name}/{version.name}/{file}": version / file})
                site.look()
            site.serves(version)
    with site.step("an upload is killed") as name:
        storage.write(f"{name}/{int(version.name) + 1}/model.onnx", b"half")
    wrong = site.take(name)
    content = (wrong / "model.onnx").read_bytes()
    with site.step("a file is wrong"):
        (wrong / "model.onnx").write_bytes(content[::-1])
        upload(wrong, URL)
    with site.step("SIGHUP"):
        site.hang_up()
    with site.step("the file is mended"):
        storage.write(f"{name}/{wrong.name}/model.onnx", content)
        site.serves(wrong)
    with site.step("files outside are named"):
        evil = site.take(name)
        edit_manifest(evil, lambda content: content["files"].update({"../../../outside": "0" * 64}))
        upload(evil, URL)
    with site.step("a version is removed"):
        take_away(f"{name}/{wrong.name}", URL)
        site.serves(version)
    with site.step("an older one is stable"):
        _label(name, "stable", "1")
        site.serves(version.with_name("1"))
    with site.step("none is stable"):
        _label(name, "stable")
        site.serves(version)


def check_starts(site: StorageSite, folder: Path) -> str:
    """Start servers while the storage is down, and with too small a disk; return what could not be checked."""
    site.storage.fault = lambda _: "down"
    with serve(URL, "--no-tune", "--no-strict") as server:
        found = {name: site.find_version(server, name) for name in NAMES}
    expect(any("is served" in line for line in server.errors), "the log does not say that the mirror is served")
    site.rows.append(["a start without the storage", "all", "", "/".join(map(str, found.values())), "", ""])
    site.storage.fault = lambda _: ""
    disk = folder / "disk"
    disk.mkdir()
    size = sum(file.stat().st_size for file in (folder / NAMES[0] / "1").rglob("*"))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", disk], check=False).returncode:
        return "a full disk, for who may not mount one"
    try:
        environment = {"XDG_CACHE_HOME": str(disk)}
        with serve(URL, "--no-tune", "--no-strict", environment=environment) as server:
            assert server.address
        sentence = "cannot be written (No space left on device); free some space"
        expect(any(sentence in line for line in server.errors), f"the log does not say {sentence!r}: {server.errors}")
        left = [path.name for path in disk.rglob(".staging-*")]
        expect(not left, f"{left} is left on the full disk")
        mirrored = len([*disk.rglob(manifest.NAME)])
        expect(mirrored == 1, f"{mirrored} versions are mirrored where one has room")
        site.rows.append(["a start on a small disk", "all", "", "1 version", "", ""])
    finally:
        subprocess.run(["umount", disk], check=True)
    return ""


def _limit(fault: Fault, part: str, count: int) -> Callable[[StorageRequest], Fault]:
    """Return what has the first downloads of some files fail."""
    left = [fault] * count
    return lambda request: left.pop() if left and request.method == "GET" and part in request.path else ""


def _label(name: str, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "resnet", "models", "label", f"{URL}/{name}", *words], check=True)


def _list_files(version: Path) -> list[str]:
    return [path.relative_to(version).as_posix() for path in version.rglob("*") if path.is_file()]


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
