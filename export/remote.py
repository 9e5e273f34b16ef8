"""A model repository in object storage: the same folders and files, and a label is a file that holds a number.

A version is complete when its manifest.json is there and every file that it names has the hash that it says. So the
manifest is written last and removed first, and nobody reads a version that is half there.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from export import inspection, manifest, repository
from resnet import BadInput, CheckFailed
from resnet.storage import StorageFolder, StoredFile, find_name, is_url

# Paths in a repository, and in a model.
PLACE = rf"(?:(?P<model>{repository.MODEL_NAME.pattern})/)?"
VERSION_FILE = re.compile(
    rf"{PLACE}(?P<number>{repository.VERSION.pattern})/"
    rf"(?P<name>{inspection.NAME.pattern}|{'|'.join(map(re.escape, sorted(manifest.UNHASHED)))})"
)
MODEL_FILE = re.compile(rf"{PLACE}(?P<name>{repository.MODEL_NAME.pattern})")
CLAIM = "labels.txt"  # each export has it: who writes it first has the number of the version
LABEL_BYTES = 20  # more digits has no version


@dataclass
class RemoteModel:
    """What the storage holds of a model.

    Attributes:
        versions: The files of each version, by path inside it; those of one that is being written, too.
        beside: The files beside the versions.
    """

    versions: dict[int, dict[str, StoredFile]] = field(default_factory=lambda: defaultdict(dict))
    beside: dict[str, StoredFile] = field(default_factory=dict)

    @property
    def complete(self) -> list[int]:
        """The versions that have a manifest, ascending."""
        return sorted(number for number, files in self.versions.items() if manifest.NAME in files)

    @property
    def labels(self) -> dict[str, StoredFile]:
        """The files that may be labels, by name."""
        return {
            name: file
            for name, file in self.beside.items()
            if name not in repository.RESERVED and not name.isdecimal() and file.size <= LABEL_BYTES
        }


def sort_files(files: Mapping[str, StoredFile]) -> dict[str, RemoteModel]:
    """Return the models of a listing, by name; under the empty name what it holds if it is that of a model itself."""
    found: dict[str, RemoteModel] = defaultdict(RemoteModel)
    for path, file in files.items():
        if match := VERSION_FILE.fullmatch(path):
            found[match["model"] or ""].versions[int(match["number"])][match["name"]] = file
        elif match := MODEL_FILE.fullmatch(path):
            found[match["model"] or ""].beside[match["name"]] = file
    return found


def compute_tag(files: Mapping[str, StoredFile]) -> str:
    """Return a value that changes when any of these files does."""
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()


def read_label(content: bytes) -> int:
    """Return the version that the file of a label names; 0 if it is no label."""
    text = content.decode("ascii", "replace").strip()
    return int(text) if repository.VERSION.fullmatch(text) else 0


def fetch(storage: StorageFolder, path: str, files: Mapping[str, StoredFile], folder: Path) -> None:
    """Download a version into a folder, and check it against its manifest.

    Args:
        storage: Where it is.
        path: Its path there: that of its model, unless the storage is that of the model, and its number.
        files: Its files, as listed.
        folder: Where to write it.

    Raises:
        BadInput: The storage failed; another time it may not.
        CheckFailed: It is not complete, or another than its manifest says, until somebody changes it.
        OSError: The folder cannot be written.
    """
    name = path if "/" in path else f"{find_name(storage.url)}/{path}"
    content = storage.read([f"{path}/{manifest.NAME}"])[f"{path}/{manifest.NAME}"]
    try:
        recorded = manifest.parse(Path(name), content)
    except BadInput as error:
        raise CheckFailed(str(error)) from None
    if recorded.files.keys() - files.keys():
        raise CheckFailed(f"{name} is not complete: files that its manifest names are missing")
    needed = recorded.files.keys() | (files.keys() & manifest.UNHASHED)
    storage.download({f"{path}/{file}": folder / file for file in needed if file != manifest.NAME})
    (folder / manifest.NAME).write_bytes(content)
    for file in sorted(needed):
        if (folder / file).stat().st_size != files[file].size:
            raise BadInput(f"{storage.url}/{path}/{file} was not received in full")
    for problem in manifest.changed_files(folder, recorded):
        raise CheckFailed(problem.replace(str(folder), name))


class Checkout:
    """A repository or model on a local disk, for a command.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        """Take a folder."""
        self.folder = folder

    def complete(self, version: Path) -> None:
        """Have all files of a version in its folder."""

    def explain(self, text: object) -> str:
        """Return a text as the user's, who knows no other place than the one that was checked out."""
        return str(text)

    def publish(self, staged: Path, finish: Callable[[int], None]) -> Path | str:
        """Publish a staged folder as the next version of the model, and return its place; see `repository.publish`."""
        return repository.publish(staged, finish)


class RemoteCheckout(Checkout):
    """An outline of what is in object storage: manifests, labels and small files; in place of the others are holes."""

    def __init__(self, url: str, folder: Path) -> None:
        """List the storage, and make the outline in an empty folder.

        Raises:
            BadInput: The storage cannot be read, or the URL is that of a bucket.
        """
        self._storage = StorageFolder(url)
        super().__init__(folder / (find_name(url) or "bucket"))
        listed = sort_files(self._storage.list_files())
        self._models = {self.folder / name: model for name, model in listed.items() if model.versions}
        self.folder.mkdir()
        labels, others = [], []
        for place, model in self._models.items():
            place.mkdir(exist_ok=True)
            for number in model.complete:
                for name, file in model.versions[number].items():
                    path = place / str(number) / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("wb") as hole:
                        hole.truncate(file.size)
            labels += [place / name for name in model.labels]
            others += [place / str(number) / manifest.NAME for number in model.complete]
            others += [place / name for name in repository.RESERVED if name in model.beside]
        contents = self._storage.read(map(self._name, labels + others))
        for path in labels:
            if label := read_label(contents[self._name(path)]):
                path.symlink_to(str(label))
        for path in others:
            path.write_bytes(contents[self._name(path)])
        self._before = {place: (repository.versions(place), repository.labels(place)) for place in self._models}

    def complete(self, version: Path) -> None:
        """Download a version of the outline.

        Raises:
            BadInput: The storage cannot be read.
            CheckFailed: The version is not what its manifest says.
        """
        files = self._models[version.parent].versions[int(version.name)]
        _tell("downloading", sum(file.size for file in files.values()), self.explain(version))
        fetch(self._storage, self._name(version), files, version)

    def explain(self, text: object) -> str:
        """Return a text with the URL in place of the folder."""
        return str(text).replace(str(self.folder), self._storage.url)

    def publish(self, staged: Path, finish: Callable[[int], None]) -> str:
        """Upload a staged folder; what fails is removed again.

        Raises:
            BadInput: The storage cannot be written.
        """
        model = self._models.get(self.folder, RemoteModel())
        number = max(model.versions, default=0) + 1
        while not self._storage.create(f"{number}/{CLAIM}", (staged / CLAIM).read_bytes()):
            number += 1
        uploaded = [f"{number}/{CLAIM}"]
        try:
            finish(number)
            names = [path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()]
            files = {f"{number}/{name}": staged / name for name in names if name not in (CLAIM, manifest.NAME)}
            uploaded += files
            _tell("uploading", sum(path.stat().st_size for path in files.values()), f"{self._storage.url}/{number}")
            beside = [name for name in repository.RESERVED if name not in model.beside or not model.complete]
            self._storage.upload(files | {name: self.folder / name for name in beside})
            self._storage.write(f"{number}/{manifest.NAME}", (staged / manifest.NAME).read_bytes())
        except BaseException:
            with suppress(BadInput):
                self._storage.remove(uploaded)
            raise
        return f"{self._storage.url}/{number}"

    def commit(self) -> None:
        """Remove the versions from the storage that the outline has lost, and change the labels that it has changed."""
        for place, (versions, labels) in self._before.items():
            changed = repository.labels(place)
            for label, number in changed.items() - labels.items():
                self._storage.write(self._name(place / label), f"{number}\n".encode())
            self._storage.remove(self._name(place / label) for label in labels.keys() - changed.keys())
            for number in sorted({*versions} - {*repository.versions(place)}):
                path = self._name(place / str(number))
                self._storage.remove([f"{path}/{manifest.NAME}"])
                others = self._models[place].versions[number].keys() - {manifest.NAME}
                self._storage.remove(f"{path}/{name}" for name in others)

    def _name(self, path: Path) -> str:
        """Return the name in the storage of a path of the outline."""
        return path.relative_to(self.folder).as_posix()


def _tell(deed: str, size: int, place: str) -> None:
    """Say what takes a while."""
    print(f"{deed} {place}, {size / 1e6:.1f} MB", file=sys.stderr)


@contextmanager
def check_out(place: str) -> Iterator[Checkout]:
    """Yield a repository or model to work with: a folder, or the outline of a URL, whose changes are written back.

    Raises:
        BadInput: The storage cannot be read or written.
    """
    if not is_url(place):
        yield Checkout(Path(place))
        return
    with tempfile.TemporaryDirectory(prefix="resnet-") as name:
        checkout = RemoteCheckout(place, Path(name))
        try:
            yield checkout
        except (BadInput, CheckFailed) as error:
            error.args = (checkout.explain(error),)
            raise
        checkout.commit()
