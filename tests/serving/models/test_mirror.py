"""What is in object storage is mirrored whole, or not at all."""

from __future__ import annotations

import logging
import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from export import manifest, remote, repository
from resnet import BadInput
from resnet.storage import StorageFolder
from serving.models import version_policy
from serving.models.mirror import Mirror
from tests.acceptance.s3 import Fault, FaultyStorage, StorageRequest, start_storage
from tests.remote import take_away, upload, write_complete

URL = "memory://bucket/models"
MIRROR = "serving.models.mirror"
LATEST = version_policy.parse("latest")
DiskUsage = namedtuple("DiskUsage", ["total", "used", "free"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """An empty cache, an empty storage in memory, and a log of errors."""
    caplog.set_level(logging.ERROR, MIRROR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    MemoryFileSystem.store.clear()


@pytest.fixture
def versions(tmp_path: Path) -> list[Path]:
    """Three local versions of a model."""
    return [write_complete(tmp_path / "local" / "colors" / str(number)) for number in (1, 2, 3)]


def refresh(mirror: Mirror, check: bool = False) -> list[str]:
    """Look once, and return what is mirrored afterwards: versions, and labels with theirs."""
    for _ in mirror.refresh(check):
        pass
    return show(mirror)


def show(mirror: Mirror) -> list[str]:
    """Return what is mirrored, and check that it is whole and that nothing else is there."""
    found = []
    for place in repository.folders(mirror.folder):
        for number in repository.versions(place):
            assert not [*manifest.changed_files(place / str(number), manifest.read(place / str(number)))]
            found.append(f"{place.name}/{number}")
        found += [f"{place.name}/{label}={number}" for label, number in repository.labels(place).items()]
    assert not [*mirror.folder.glob(f"{repository.STAGING}*")]
    return sorted(found)


def test_versions_and_labels_are_followed(versions: list[Path]) -> None:
    """As they come, move and go."""
    mirror, storage = Mirror(URL), StorageFolder(URL)
    upload(versions[0], URL)
    upload(versions[1], URL)
    assert refresh(mirror) == ["colors/1", "colors/2"]
    storage.write("colors/stable", b"1\n")
    storage.write("colors/notes", b"one\n")
    assert refresh(mirror) == ["colors/1", "colors/2", "colors/stable=1"]
    storage.write("colors/stable", b"3\n")
    assert refresh(mirror) == ["colors/1", "colors/2", "colors/stable=1"]  # there is no 3
    upload(versions[2], URL)
    take_away("colors/1", URL)
    assert refresh(mirror) == ["colors/2", "colors/3", "colors/stable=3"]
    storage.remove(["colors/stable"])
    assert refresh(mirror) == ["colors/2", "colors/3"]


def test_a_label_that_a_rollout_moved_stays_until_it_changes_in_the_storage(versions: list[Path]) -> None:
    """Each server rolls out for itself; after a restart, too."""
    mirror, storage = Mirror(URL), StorageFolder(URL)
    for version in versions:
        upload(version, URL)
    storage.write("colors/stable", b"1\n")
    refresh(mirror)
    repository.label(mirror.folder / "colors", "stable", 2)
    assert "colors/stable=2" in refresh(Mirror(URL))
    storage.write("colors/stable", b"3\n")
    assert "colors/stable=3" in refresh(mirror)


def test_nothing_is_fetched_twice(versions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the same server, nor by the next one, nor by one beside it."""
    upload(versions[0], URL)
    StorageFolder(URL).write("colors/stable", b"1\n")
    mirror = Mirror(URL)
    refresh(mirror)
    monkeypatch.setattr(StorageFolder, "download", None)
    assert refresh(Mirror(URL)) == ["colors/1", "colors/stable=1"]
    monkeypatch.setattr(StorageFolder, "read", lambda _, names: {name: pytest.fail(name) for name in names})
    assert refresh(mirror) == ["colors/1", "colors/stable=1"]


def test_another_version_under_the_same_number_is_fetched(versions: list[Path]) -> None:
    """The old one stays until the new one is whole."""
    mirror = Mirror(URL)
    upload(versions[0], URL)
    refresh(mirror)
    before = manifest.read(mirror.folder / "colors" / "1")
    (versions[0] / "saved_model.pb").write_bytes(b"other")
    upload(versions[0], URL)
    assert refresh(mirror) == ["colors/1"]
    assert manifest.read(mirror.folder / "colors" / "1") == before
    before.files["saved_model.pb"] = manifest.hash_files(versions[0])["saved_model.pb"]
    before.write(versions[0])
    upload(versions[0], URL)
    assert refresh(mirror) == ["colors/1"]
    assert (mirror.folder / "colors" / "1" / "saved_model.pb").read_bytes() == b"other"


def test_a_version_that_is_being_uploaded_is_not_seen(versions: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    """Whether its manifest is last or first; of the latter the log speaks once."""
    mirror, storage = Mirror(URL), StorageFolder(URL)
    upload(versions[0], URL)
    names = ["manifest.json", "labels.txt", "model.onnx", "reference.npz", "saved_model.pb"]
    for name in names[1:]:
        storage.upload({f"colors/2/{name}": versions[1] / name})
        assert refresh(mirror) == ["colors/1"]
    assert not caplog.records
    for name in names:
        storage.upload({f"colors/3/{name}": versions[2] / name})
        assert refresh(mirror) == ["colors/1", *(["colors/3"] if name == names[-1] else [])]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"colors/3 of {URL} is not mirrored: colors/3 is not complete: files that its manifest names are missing"
    )


def test_what_is_not_as_its_manifest_says_is_refused_until_it_changes(
    versions: list[Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is downloaded once, and the log says why."""
    mirror = Mirror(URL)
    upload(versions[0], URL)
    good = (versions[1] / "model.onnx").read_bytes()
    (versions[1] / "model.onnx").write_bytes(good[::-1])
    upload(versions[1], URL)
    assert refresh(mirror) == ["colors/1"]
    assert "colors/2/model.onnx is not the file that was exported" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(StorageFolder, "download", None)
        assert refresh(mirror) == ["colors/1"]
    assert len(caplog.records) == 1
    StorageFolder(URL).write("colors/2/model.onnx", good)
    assert refresh(mirror) == ["colors/1", "colors/2"]


def test_what_was_changed_in_the_mirror_is_fetched_again(versions: list[Path]) -> None:
    """At a start, and on SIGHUP."""
    upload(versions[0], URL)
    mirror = Mirror(URL)
    refresh(mirror)
    for look in (lambda: mirror.start(LATEST), lambda: refresh(mirror, check=True)):
        (mirror.folder / "colors" / "1" / "model.onnx").write_bytes(b"")
        look()
        assert show(mirror) == ["colors/1"]


def test_what_is_served_comes_first(versions: list[Path]) -> None:
    """The latest version, unless --versions says otherwise, and labelled ones; the others follow."""
    for version in versions:
        upload(version, URL)
    StorageFolder(URL).write("colors/stable", b"1\n")
    mirror = Mirror(URL)
    mirror.start(LATEST)
    assert show(mirror) == ["colors/1", "colors/3", "colors/stable=1"]
    assert [*mirror.refresh()] == [None]
    assert show(mirror) == ["colors/1", "colors/2", "colors/3", "colors/stable=1"]


def test_an_empty_storage_takes_nothing_away(versions: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    """As a folder that is empty; the log says so once, and when it is over."""
    caplog.set_level(logging.INFO, MIRROR)
    upload(versions[0], URL)
    mirror = Mirror(URL)
    refresh(mirror)
    take_away("colors/1", URL)
    caplog.clear()
    assert refresh(mirror) == refresh(mirror) == ["colors/1"]
    upload(versions[0], URL)
    refresh(mirror)
    size = sum(path.stat().st_size for path in versions[0].rglob("*") if path.is_file())
    assert [record.getMessage() for record in caplog.records] == [
        f"{URL} holds no models; `resnet export RUN --to {URL}/NAME` makes one; what is mirrored stays",
        f"colors/1 is fetched, {size / 1e6:.1f} MB",
        "colors/1 is mirrored",
        f"{URL} is mirrored again",
    ]


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("colors", "memory://bucket/models/colors is a model; name its repository, memory://bucket/models"),
        (
            "none",
            "memory://bucket/models/none holds no models; `resnet export RUN --to memory://bucket/models/none/NAME`",
        ),
    ],
)
def test_a_server_starts_with_a_repository(versions: list[Path], place: str, sentence: str) -> None:
    """Anything else is one sentence."""
    upload(versions[0], URL)
    with pytest.raises(BadInput) as caught:
        Mirror(f"{URL}/{place}").start(LATEST)
    assert str(caught.value).startswith(sentence)


def test_an_outage_at_the_start_is_outlived_by_a_mirror(
    versions: list[Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is served, unless the server is strict; without one there is nothing to serve."""

    def fail(_: StorageFolder) -> None:
        raise BadInput("the storage is down")

    upload(versions[0], URL)
    with monkeypatch.context() as patch:
        patch.setattr(StorageFolder, "list_files", fail)
        with pytest.raises(BadInput, match="the storage is down"):
            Mirror(URL).start(LATEST)
        patch.undo()
        refresh(Mirror(URL))
        patch.setattr(StorageFolder, "list_files", fail)
        mirror = Mirror(URL)
        mirror.start(LATEST)
        assert show(mirror) == ["colors/1"]
        assert f"the storage is down; what {mirror.folder} mirrors is served" in caplog.text
        with pytest.raises(BadInput, match="the storage is down"):
            mirror.start(LATEST, strict=True)


def test_a_full_disk_costs_only_what_has_no_room(
    versions: list[Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels still move, and nothing is left behind; whether the room is known to be too small or turns out so."""
    mirror = Mirror(URL)
    upload(versions[0], URL)
    refresh(mirror)
    upload(versions[1], URL)
    StorageFolder(URL).write("colors/best", b"1\n")

    def fill(_: StorageFolder, targets: dict[str, Path]) -> None:
        target = next(iter(targets.values()))
        target.parent.mkdir()
        target.touch()
        raise OSError(28, os.strerror(28))

    sentence = f"{mirror.folder} cannot be written (No space left on device); free some space"
    with monkeypatch.context() as patch:
        patch.setattr(StorageFolder, "download", fill)
        assert refresh(mirror) == ["colors/1", "colors/best=1"]
        patch.setattr(StorageFolder, "download", None)
        patch.setattr(shutil, "disk_usage", lambda _: DiskUsage(1, 1, 0))
        assert refresh(mirror) == ["colors/1", "colors/best=1"]
    assert caplog.text.count(sentence) == 1
    assert refresh(mirror) == ["colors/1", "colors/2", "colors/best=1"]


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BadInput, match="cannot be written .* or name another cache by XDG_CACHE_HOME"):
        Mirror(URL)


def test_two_servers_share_a_mirror(versions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """While one fetches a version, the other waits for it, and fetches it not again."""
    upload(versions[0], URL)
    first, second = Mirror(URL), Mirror(URL)
    fetch, fetched = remote.fetch, []

    def look_meanwhile(*args: object) -> None:
        fetched.append(args[1])
        with pytest.raises(BlockingIOError):
            _lock(first.folder)
        fetch(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(remote, "fetch", look_meanwhile)
    assert refresh(first) == refresh(second) == ["colors/1"]
    assert fetched == ["colors/1"]


def _lock(folder: Path) -> None:
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyStorage]:
    """A real server of S3."""
    with start_storage() as storage:
        yield storage


def once(fault: Fault, part: str) -> Callable[[StorageRequest], Fault]:
    """Return what has one request for a path fail."""
    left = [fault]
    return lambda request: left.pop() if left and request.method == "GET" and part in request.path else ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "is_mended"), [("cut", True), ("busy", True), ("short", False), ("changed", False), ("expired", False)]
)
def test_half_a_download_is_none(s3: FaultyStorage, versions: list[Path], fault: Fault, is_mended: bool) -> None:
    """What the driver does not mend is not mirrored, and is by the next look.

    The driver itself finds a body that is changed, by its checksum.
    """
    url = f"s3://bucket/{fault}"
    upload(versions[0], url)
    mirror = Mirror(url)
    assert refresh(mirror) == ["colors/1"]
    upload(versions[1], url)
    s3.fault = once(fault, "2/model.onnx")
    try:
        assert refresh(mirror) == ["colors/1", "colors/2"][: 1 + is_mended]
    finally:
        s3.fault = lambda _: ""
    assert refresh(mirror) == ["colors/1", "colors/2"]


@pytest.mark.slow
def test_a_look_at_s3_is_one_request(s3: FaultyStorage, versions: list[Path]) -> None:
    """However many versions there are; a token that has expired ends nothing."""
    for version in versions:
        upload(version, "s3://bucket/quiet")
    mirror = Mirror("s3://bucket/quiet")
    assert refresh(mirror) == ["colors/1", "colors/2", "colors/3"]
    s3.requests.clear()
    refresh(mirror)
    assert s3.requests.total() == 1
    s3.fault = once("expired", "list-type")
    assert refresh(mirror) == ["colors/1", "colors/2", "colors/3"]
    with pytest.raises(BadInput, match="s3://nobucket/models cannot be read: there is no such bucket or file"):
        Mirror("s3://nobucket/models").start(LATEST)


@pytest.mark.slow
def test_s3_has_conditional_writes(s3: FaultyStorage) -> None:  # noqa: ARG001
    """So that two exports never share a number."""
    storage = StorageFolder("s3://bucket/created")
    assert storage.create("a", b"one")
    assert not storage.create("a", b"two")
    assert storage.read(["a"]) == {"a": b"one"}
