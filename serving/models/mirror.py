"""A mirror of a model repository in object storage: the folder that a server serves in its place."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import msgspec

from export import files, manifest, remote, repository
from export.remote import RemoteModel
from resnet import BadInput, CheckFailed
from resnet.storage import StorageFolder, StoredFile
from serving.models.version_policy import ALL, VersionPolicy
from serving.runtimes import cache

RECORD = ".mirror.json"  # the tag of each version and label that was fetched, by path

log = logging.getLogger(__name__)


class StoredLabel(NamedTuple):
    """A file that may be a label: its tag, and the version that it names; 0 if it names none."""

    tag: str
    version: int


class Mirror:
    """Keeps a folder in the user's cache like a repository in object storage: its versions and labels.

    A version is fetched beside the others, checked, and moved to its place by a rename. What the storage has no more is
    removed; while it cannot be read, all stays. Several servers may share the folder. What they write themselves stays:
    records of rollouts, and the labels that these move, until a label changes in the storage.

    Attributes:
        folder: The folder.
    """

    def __init__(self, url: str) -> None:
        """Make the folder; the storage is asked nothing yet.

        Raises:
            BadInput: The driver is missing, or the folder cannot be made.
        """
        self._storage = StorageFolder(url)
        self.folder = cache.find_folder("models") / quote(self._storage.url, safe="")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._explain(error) from None
        self._refused: dict[str, str] = {}
        self._problems: dict[str, str] = {}
        self._labels: dict[str, StoredLabel] = {}
        self._read = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since the storage was last read."""
        return time.monotonic() - self._read

    def start(self, policies: Mapping[str, VersionPolicy], strict: bool = False) -> None:
        """Fetch the versions that are to be served; the first `refresh` fetches the others.

        Args:
            policies: As of a `Watcher`.
            strict: Do not go on with what is mirrored already if the storage cannot be read.

        Raises:
            BadInput: The storage cannot be read, or holds no model.
        """
        try:
            for _ in self._update(lambda name: policies.get(name, policies[""]), check=True):
                pass
        except BadInput as error:
            if strict or not any(map(repository.has_versions, repository.folders(self.folder))):
                raise
            self._report("", f"{error}; what {self.folder} mirrors is served")

    def refresh(self, check: bool = False) -> Iterator[None]:
        """Look for changes of the storage once, and yield after each version that is fetched; this raises nothing.

        Args:
            check: Also fetch again what was refused, and what has changed in the mirror.
        """
        try:
            yield from self._update(lambda _: ALL, check)
        except BadInput as error:
            self._report("", f"{error}; what is mirrored stays")

    def _update(self, find_policy: Callable[[str], VersionPolicy], check: bool) -> Iterator[None]:
        """Do as `refresh`, for the versions that a policy chooses or that have a label."""
        models = self._list_models()
        labels = self._read_labels(models)
        if check:
            self._refused.clear()
        self._remove(models)
        for name, model in models.items():
            labelled = {label.version for path, label in labels.items() if path.startswith(f"{name}/")}
            chosen = {*find_policy(name).choose(model.complete), *labelled}
            for number in sorted(chosen.intersection(model.complete), reverse=True):
                if self._fetch(f"{name}/{number}", model.versions[number], check):
                    yield
        self._set_labels(labels)
        self._report("", None)

    def _list_models(self) -> dict[str, RemoteModel]:
        """Return the models of the storage with a version, by name.

        Raises:
            BadInput: There is none, or the storage cannot be read.
        """
        url = self._storage.url
        models = remote.sort_files(self._storage.list_files())
        if models[""].complete:
            raise BadInput(f"{url} is a model; name its repository, {url.rpartition('/')[0]}")
        models = {name: model for name, model in sorted(models.items()) if model.complete}
        if not models:
            raise BadInput(f"{url} holds no models; `resnet export RUN --to {url}/NAME` makes one")
        self._read = time.monotonic()
        return models

    def _read_labels(self, models: Mapping[str, RemoteModel]) -> dict[str, StoredLabel]:
        """Return the labels of the storage, by path; a file that did not change is not read again."""
        tags = {f"{name}/{label}": file.tag for name, model in models.items() for label, file in model.labels.items()}
        kept = {path: label for path, label in self._labels.items() if label.tag == tags.get(path)}
        read = self._storage.read(tags.keys() - kept.keys())
        self._labels = kept | {path: StoredLabel(tags[path], remote.read_label(read[path])) for path in read}
        return {path: label for path, label in self._labels.items() if label.version}

    def _remove(self, models: Mapping[str, RemoteModel]) -> None:
        """Remove the versions that the storage has no more."""
        with self._record() as known:
            for place in repository.folders(self.folder):
                kept = models[place.name].complete if place.name in models else []
                for number in {*repository.versions(place)} - {*kept}:
                    known.pop(f"{place.name}/{number}", None)
                    with self._staging() as staged:
                        (place / str(number)).rename(staged / "old")

    def _fetch(self, path: str, stored: Mapping[str, StoredFile], check: bool) -> bool:
        """Fetch a version if it is not mirrored as it is, and return whether it was fetched; this raises nothing."""
        tag, place = remote.compute_tag(stored), self.folder / path
        if self._refused.get(path) == tag:
            return False
        try:
            with self._record() as known:
                if known.get(path) == tag and place.is_dir() and not (check and _is_changed(place)):
                    return False
                with self._staging() as staged:
                    size = sum(file.size for file in stored.values())
                    log.info("%s is fetched, %.1f MB", path, size / 1e6)
                    if size > shutil.disk_usage(staged).free:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    remote.fetch(self._storage, path, stored, staged / "new")
                    repository.sync(staged)
                    place.parent.mkdir(exist_ok=True)
                    if place.exists():
                        place.rename(staged / "old")
                    (staged / "new").rename(place)
                known[path] = tag
        except (BadInput, CheckFailed) as error:
            if isinstance(error, CheckFailed):
                self._refused[path] = tag
            self._report(path, f"{path} of {self._storage.url} is not mirrored: {error}")
            return False
        self._report(path, None)
        log.info("%s is mirrored", path)
        return True

    def _set_labels(self, labels: Mapping[str, StoredLabel]) -> None:
        """Set the labels that have changed in the storage, and remove those that it has no more."""
        with self._record() as known:
            for path, label in labels.items():
                place = self.folder / path
                if known.get(path) != label.tag and label.version in repository.versions(place.parent):
                    repository.label(place.parent, place.name, label.version)
                    known[path] = label.tag
            for path in known.keys() - labels.keys():
                place = self.folder / path
                if not place.name.isdecimal():
                    with suppress(BadInput, OSError):  # a hand was quicker
                        repository.unlabel(place.parent, place.name)
                    del known[path]

    @contextmanager
    def _record(self) -> Iterator[dict[str, str]]:
        """Yield the record for this process alone, and keep what is changed in it.

        Raises:
            BadInput: The folder cannot be written, here or in the block.
        """
        try:
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                before = _read_record(self.folder / RECORD)
                known = dict(before)
                yield known
                if known != before:
                    files.write(self.folder / RECORD, msgspec.json.format(msgspec.json.encode(known)))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._explain(error) from None

    def _explain(self, error: OSError) -> BadInput:
        return BadInput(
            f"{self.folder} cannot be written ({error.strerror}); free some space, or name another cache by "
            "XDG_CACHE_HOME"
        )

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        """Yield an empty folder beside the models, and remove it afterwards with what killed servers have left."""
        staged = Path(tempfile.mkdtemp(prefix=repository.STAGING, dir=self.folder))
        try:
            yield staged
        finally:
            for folder in self.folder.glob(f"{repository.STAGING}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _report(self, path: str, problem: str | None) -> None:
        """Log why a version, or with an empty path the storage, is not mirrored; once until that changes."""
        if problem is None:
            if self._problems.pop(path, None) and not path:
                log.info("%s is mirrored again", self._storage.url)
        elif self._problems.get(path) != problem:
            self._problems[path] = problem
            log.error(problem)


def _is_changed(version: Path) -> bool:
    """Return whether a mirrored version is another than its manifest says."""
    try:
        return any(manifest.changed_files(version, manifest.read(version)))
    except BadInput:
        return True


def _read_record(path: Path) -> dict[str, str]:
    """Return the record; an empty one, so that all is fetched again, if it cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        return {}
