"""The model repository: folders REPOSITORY/NAME/VERSION. VERSION is an integer; the highest is the latest version."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from export import manifest
from export.manifest import NAME as MANIFEST
from resnet import BadInput

STAGING, NEW = ".staging-", ".new-"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
VERSION = re.compile(r"[1-9][0-9]{0,17}")  # as in protocols, where it is a 64-bit integer
ROLLOUT = ".rollout.json"  # of a server, in the folder of a model; hidden, so that nobody takes it for a label
RESERVED = ("config.pbtxt", "labels.txt")  # Triton reads them in the folder of a model


def versions(model: Path) -> list[int]:
    """Return the version numbers of a model, ascending; none if there is no such folder.

    Raises:
        OSError: The folder cannot be read.
    """
    try:
        return sorted(int(path.name) for path in model.iterdir() if VERSION.fullmatch(path.name) and path.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def labels(model: Path) -> dict[str, int]:
    """Return the labelled versions, by label. A label is a symbolic link in the model folder, as `stable -> 3`.

    Raises:
        OSError: The folder cannot be read.
    """
    available = versions(model)
    found = {path.name: _read_label(path) for path in sorted(model.iterdir())}
    return {label: number for label, number in found.items() if number in available}


def label(model: Path, name: str, number: int) -> None:
    """Set a label to a version; a label that another version has moves.

    Raises:
        BadInput: The label is a number, has other characters than a name, or is the name of a file; or there is no such
            version.
    """
    if not MODEL_NAME.fullmatch(name) or name.isdecimal():
        raise BadInput(
            f"the label {name!r} is invalid: use letters, digits, dots, dashes and underscores, and not a number alone"
        )
    path = model / name
    if name in RESERVED or (os.path.lexists(path) and _read_label(path) is None):
        raise BadInput(f"the label {name!r} is invalid: {path} is a file or folder of its own; choose another label")
    part = model / f"{STAGING}{name}"
    part.unlink(missing_ok=True)
    part.symlink_to(version(model, number).name)
    part.replace(path)  # atomic: a server sees the old version or the new one


def unlabel(model: Path, name: str) -> None:
    """Remove a label.

    Raises:
        BadInput: There is no such label.
    """
    if not MODEL_NAME.fullmatch(name) or _read_label(model / name) is None:
        raise BadInput(f"{model} has no label {name!r}; it has {', '.join(labels(model)) or 'none'}")
    (model / name).unlink()


def _read_label(path: Path) -> int | None:
    """Return the version that a label links to, whether it is there or not; None for what is not a label."""
    if not MODEL_NAME.fullmatch(path.name) or path.name.isdecimal():
        return None
    try:
        target = Path(os.path.normpath(path.parent / path.readlink()))
    except OSError:  # not a link, or removed meanwhile
        return None
    is_version = VERSION.fullmatch(target.name) and target.parent in (path.parent, path.parent.absolute())
    return int(target.name) if is_version else None


def latest(model: Path) -> Path:
    """Return the folder of the highest version.

    Raises:
        BadInput: The model has no version.
    """
    numbers = versions(model)
    if not numbers:
        raise BadInput(explain(model))
    return model / str(numbers[-1])


def version(model: Path, number: int | None) -> Path:
    """Return the folder of a version, the highest if `number` is None.

    Raises:
        BadInput: There is no such version.
    """
    newest = latest(model)
    if number is None:
        return newest
    if number not in versions(model):
        raise BadInput(f"{model} has no version {number}; it has {versions(model)}")
    return model / str(number)


def folders(repository: Path) -> list[Path]:
    """Return the folders of a repository that may be models, sorted by name: all that are not hidden.

    Raises:
        OSError: The repository cannot be read.
    """
    return sorted(path for path in repository.iterdir() if not path.name.startswith(".") and _is_folder(path))


def models(repository: Path) -> list[Path]:
    """Return the folders of all models with a version, sorted by name, and those that cannot be read.

    Raises:
        BadInput: There are no models.
        OSError: The repository cannot be read.
    """
    found = folders(repository) if repository.is_dir() else []
    complete = [folder for folder in found if MODEL_NAME.fullmatch(folder.name) and has_versions(folder)]
    if not complete:
        raise BadInput(explain(repository))
    return complete


def find_mistake(folder: Path) -> str | None:
    """Return what a folder is that was taken for a repository, and what to do; None if it may be one."""
    if not folder.exists():
        return f"{folder} does not exist; `resnet export RUN --to REPOSITORY/NAME` makes a model in a repository"
    if not folder.is_dir():
        return f"{folder} is a file; name the folder of a model or repository"
    if (folder / MANIFEST).exists():
        return f"{folder} is a version; name its model, {folder.parent}, or repository, {folder.parent.parent}"
    if (folder / "saved_model.pb").exists():
        return f"{folder} is a SavedModel that `resnet export` did not make; export its Keras original, a .keras file"
    if (folder / "model.keras").exists():
        return f"{folder} is a run folder; `resnet export {folder} --to REPOSITORY/NAME` makes a model of it"
    if versions(folder):
        return f"{folder} is a model; name its repository, {folder.parent}"
    return None


@contextmanager
def opened(folder: Path) -> Iterator[Path]:
    """Yield a repository; for the folder of a model, a temporary repository that links to it under the model's name.

    Platforms mount a model under a name of theirs: KServe does at /mnt/models.

    Raises:
        BadInput: As in `find_name`, or no temporary folder can be made.
    """
    if not versions(folder):
        yield folder
        return
    name = find_name(folder)
    try:
        link = tempfile.TemporaryDirectory(prefix="resnet-", ignore_cleanup_errors=True)
    except OSError as error:
        raise BadInput(
            f"{folder} is a model, and no folder can be made for a link to it ({error}); set TMPDIR"
        ) from None
    with link as parent:
        (Path(parent) / name).symlink_to(folder.absolute())
        yield Path(parent)


def find_name(model: Path) -> str:
    """Return the name of the model with versions in a folder, as they have it.

    Raises:
        BadInput: No version has a manifest with a valid name.
    """
    for number in reversed(versions(model)):
        with suppress(BadInput):
            name = manifest.read_name(model / str(number))
            if MODEL_NAME.fullmatch(name):
                return name
    raise BadInput(f"{model} holds no version that `resnet export` made: no manifest.json names its model")


def explain(folder: Path) -> str:
    """Return why a folder is not the model with versions, or the repository with models, that it was taken for."""
    mistake = find_mistake(folder)
    if mistake:
        return mistake
    inner = [path.name for path in folders(folder) if MODEL_NAME.fullmatch(path.name) and has_versions(path)]
    if inner:
        return f"{folder} is a repository; name one of its models: {', '.join(inner)}"
    return f"{folder} holds no models; `resnet export RUN --to REPOSITORY/NAME` makes one"


def _is_folder(path: Path) -> bool:
    """Return whether a path is a folder, or cannot be looked at."""
    try:
        return path.is_dir()
    except OSError:
        return True


def has_versions(model: Path) -> bool:
    """Return whether a model has versions, or cannot be read."""
    try:
        return bool(versions(model))
    except OSError:
        return True


@contextmanager
def staging(model: Path) -> Iterator[Path]:
    """Yield an empty folder beside the versions of a model, and remove it afterwards if it was not published.

    Its process holds a lock on it; folders that killed exports left have none, and are removed.

    Raises:
        BadInput: The name of the model is invalid in a path or URL, or the folder cannot be written.
    """
    if not MODEL_NAME.fullmatch(model.name):
        raise BadInput(
            f"--to {model}: the model name {model.name!r} is invalid; use letters, digits, dots, dashes and underscores"
        )
    new = model / f"{NEW}{secrets.token_hex(8)}"
    try:
        model.mkdir(parents=True, exist_ok=True)
        new.mkdir()  # unlike mkdtemp with the permissions that the umask gives, as those of the files are
        lock = _lock(new)
        folder = new.rename(model / new.name.replace(NEW, STAGING))  # from here on it may be swept, once it is unlocked
    except OSError as error:
        raise BadInput(f"--to {model} cannot be written: {error.strerror}") from None
    try:
        for _ in _sweep(model):
            pass
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def publish(staged: Path, finish: Callable[[int], None]) -> Path:
    """Publish a staged folder as the next version. It appears complete, by a rename, or not at all.

    Args:
        staged: A folder from `staging`.
        finish: Called with the version number before the folder moves; it writes the files that depend on the number.

    Returns:
        The folder of the version.

    Raises:
        BadInput: There is no further number.
    """
    model = staged.parent
    while True:
        # Files and links too, which are no versions, but in the way.
        taken = [int(path.name) for path in model.iterdir() if VERSION.fullmatch(path.name)]
        version = max(taken, default=0) + 1
        if not VERSION.fullmatch(str(version)):
            raise BadInput(f"{model / str(version - 1)} has the highest number that a version can have; rename it")
        finish(version)
        sync(staged)
        try:
            staged.rename(model / str(version))
        except OSError:
            if not os.path.lexists(model / str(version)):
                raise
            continue  # another export took the number
        _sync_entry(model)
        return model / str(version)


def prune(model: Path, keep: int) -> Iterator[Path]:
    """Remove old versions of a model, except those with a label or in a rollout, and what killed exports left.

    Args:
        model: REPOSITORY/NAME.
        keep: Number of highest versions to keep, at least 1.

    Yields:
        Each removed folder.
    """
    needed = {*labels(model).values(), *_list_rolled_out(model)}
    for number in [number for number in versions(model)[:-keep] if number not in needed]:
        # Renamed first, so that nobody sees an incomplete version.
        hidden = (model / str(number)).rename(model / f"{STAGING}{secrets.token_hex(8)}")
        shutil.rmtree(hidden, ignore_errors=True)
        yield model / str(number)
    yield from _sweep(model)


def _list_rolled_out(model: Path) -> list[int]:
    """Return the versions of a rollout that has not ended."""
    try:
        record = msgspec.json.decode((model / ROLLOUT).read_bytes(), type=_RolloutVersions)
    except (OSError, msgspec.DecodeError):
        return []
    return [record.version, record.stable] if record.state in ("running", "paused") else []


class _RolloutVersions(msgspec.Struct):
    """What the record of a rollout says of its versions; `serving.rollouts.record` has the rest."""

    version: int
    stable: int
    state: str


def _sweep(model: Path) -> Iterator[Path]:
    """Remove and yield the staging folders of killed exports."""
    for folder in sorted(path for path in model.glob(f"{STAGING}*") if not path.is_symlink()):
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            yield folder


def _lock(folder: Path) -> int | None:
    """Lock a folder until the returned descriptor is closed or the process ends.

    None if another process holds the lock, the folder is gone, or its file system has no locks of folders, such as NFS.
    """
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def sync(folder: Path) -> None:
    """Have a folder and all in it written to the disk, so that what is renamed to its place is whole after a crash."""
    for path in (*folder.rglob("*"), folder):
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
