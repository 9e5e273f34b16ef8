"""The model repository: REPOSITORY/NAME/VERSION, where VERSION is an integer and the highest is the latest."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from resnet import BadInput

STAGING = ".staging-"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def versions(model: Path) -> list[int]:
    """Return the version numbers in the folder of a model, ascending."""
    if not model.is_dir():
        return []
    return sorted(int(path.name) for path in model.iterdir() if path.name.isdecimal() and path.is_dir())


def labels(model: Path) -> dict[str, int]:
    """Return the versions that have labels, by label: each is a link in the folder of the model, as `stable -> 3`."""
    links = [path for path in sorted(model.iterdir()) if path.is_symlink() and not path.name.isdecimal()]
    found = {link.name: link.readlink().name for link in links if MODEL_NAME.fullmatch(link.name) and link.is_dir()}
    return {label: int(target) for label, target in found.items() if target.isdecimal()}


def label(model: Path, name: str, number: int) -> None:
    """Give a label to a version, which takes it from the one that had it.

    Raises:
        BadInput: The label could be a number or part of a path, or there is no such version.
    """
    if not MODEL_NAME.fullmatch(name) or name.isdecimal():
        raise BadInput(f"a label has letters, digits, dots, dashes and underscores and is no number, not {name!r}")
    part = model / f"{STAGING}{name}"
    part.unlink(missing_ok=True)
    part.symlink_to(version(model, number).name)
    part.replace(model / name)  # at once: a server sees the old version or the new one


def unlabel(model: Path, name: str) -> None:
    """Take a label away.

    Raises:
        BadInput: There is no such label.
    """
    if name not in labels(model):
        raise BadInput(f"{model} has no label {name!r}; it has {', '.join(labels(model)) or 'none'}")
    (model / name).unlink()


def latest(model: Path) -> Path:
    """Return the folder of the highest version.

    Raises:
        BadInput: There is none.
    """
    found = versions(model)
    if not found:
        raise BadInput(f"{model} holds no model version; `resnet export ... --to {model}` makes one")
    return model / str(found[-1])


def version(model: Path, number: int | None) -> Path:
    """Return the folder of a version, the highest if `number` is None.

    Raises:
        BadInput: There is no such version.
    """
    if number is None:
        return latest(model)
    if number not in versions(model):
        raise BadInput(f"{model} has no version {number}; it has {versions(model) or 'none'}")
    return model / str(number)


def models(repository: Path) -> list[Path]:
    """Return the folders of all models that have a version, by name.

    Raises:
        BadInput: There are none.
    """
    folders = sorted(repository.iterdir()) if repository.is_dir() else []
    found = [folder for folder in folders if MODEL_NAME.fullmatch(folder.name) and versions(folder)]
    if not found:
        raise BadInput(f"{repository} holds no models; `resnet export ... --to {repository}/NAME` puts one there")
    return found


@contextmanager
def staging(model: Path) -> Iterator[Path]:
    """Yield an empty folder beside the versions of a model, and remove whatever is left of it afterwards.

    It is locked for as long as its process lives, so that `prune` can tell it from what a killed export left.

    Raises:
        BadInput: The name of the model is not fit for a folder and a URL, or the folder cannot be written.
    """
    if not MODEL_NAME.fullmatch(model.name):
        raise BadInput(
            f"--to {model}: a model's name has letters, digits, dots, dashes and underscores, not {model.name!r}"
        )
    try:
        model.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=STAGING, dir=model))
    except OSError as error:
        raise BadInput(f"--to {model} cannot be written: {error.strerror}") from None
    folder.chmod(0o755)  # mkdtemp keeps it to its owner; a server may run as somebody else
    lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def publish(staged: Path, finish: Callable[[int], None]) -> Path:
    """Make a staged folder the next version, visible whole or not at all.

    Args:
        staged: A folder from `staging`.
        finish: Called with the version number before the folder moves; it writes what depends on the number.

    Returns:
        The folder of the version.
    """
    model = staged.parent
    while True:
        version = max(versions(model), default=0) + 1
        finish(version)
        _sync(staged)
        try:
            staged.rename(model / str(version))
        except OSError:
            if not (model / str(version)).exists():
                raise
            continue  # another export took the number
        _sync_entry(model)
        return model / str(version)


def prune(model: Path, keep: int) -> Iterator[Path]:
    """Remove all but the highest versions of a model and those with labels, and what killed exports left.

    Args:
        model: REPOSITORY/NAME.
        keep: How many versions stay, at least 1.

    Yields:
        Each folder that was removed.
    """
    labelled = labels(model).values()
    for number in [number for number in versions(model)[:-keep] if number not in labelled]:
        # Renamed first, so that nobody sees a version with files missing.
        hidden = Path(tempfile.mkdtemp(prefix=STAGING, dir=model))
        (model / str(number)).rename(hidden / str(number))
        shutil.rmtree(hidden)
        yield model / str(number)
    for folder in sorted(path for path in model.glob(f"{STAGING}*") if not path.is_symlink()):
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            yield folder


def _lock(folder: Path) -> int | None:
    """Lock a folder until the returned descriptor is closed or the process ends; None if another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
