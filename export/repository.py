"""The model repository: folders REPOSITORY/NAME/VERSION. VERSION is an integer; the highest is the latest version."""

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
    """Return the version numbers of a model, ascending."""
    if not model.is_dir():
        return []
    return sorted(int(path.name) for path in model.iterdir() if path.name.isdecimal() and path.is_dir())


def labels(model: Path) -> dict[str, int]:
    """Return the labelled versions, by label. A label is a symbolic link in the model folder, as `stable -> 3`."""
    links = [path for path in sorted(model.iterdir()) if path.is_symlink() and not path.name.isdecimal()]
    targets = {link.name: link.readlink().name for link in links if MODEL_NAME.fullmatch(link.name) and link.is_dir()}
    return {label: int(target) for label, target in targets.items() if target.isdecimal()}


def label(model: Path, name: str, number: int) -> None:
    """Set a label to a version; a label that another version has moves.

    Raises:
        BadInput: The label is a number or has other characters than a name, or there is no such version.
    """
    if not MODEL_NAME.fullmatch(name) or name.isdecimal():
        raise BadInput(
            f"the label {name!r} is invalid: use letters, digits, dots, dashes and underscores, and not a number alone"
        )
    part = model / f"{STAGING}{name}"
    part.unlink(missing_ok=True)
    part.symlink_to(version(model, number).name)
    part.replace(model / name)  # atomic: a server sees the old version or the new one


def unlabel(model: Path, name: str) -> None:
    """Remove a label.

    Raises:
        BadInput: There is no such label.
    """
    if name not in labels(model):
        raise BadInput(f"{model} has no label {name!r}; it has {', '.join(labels(model)) or 'none'}")
    (model / name).unlink()


def latest(model: Path) -> Path:
    """Return the folder of the highest version.

    Raises:
        BadInput: The model has no version.
    """
    numbers = versions(model)
    if not numbers:
        raise BadInput(f"{model} holds no model version; `resnet export ... --to {model}` makes one")
    return model / str(numbers[-1])


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
    """Return the folders of all models with a version, sorted by name.

    Raises:
        BadInput: There are no models.
    """
    folders = sorted(repository.iterdir()) if repository.is_dir() else []
    complete = [folder for folder in folders if MODEL_NAME.fullmatch(folder.name) and versions(folder)]
    if not complete:
        raise BadInput(f"{repository} holds no models; `resnet export ... --to {repository}/NAME` adds one")
    return complete


@contextmanager
def staging(model: Path) -> Iterator[Path]:
    """Yield an empty folder beside the versions of a model, and remove it afterwards if it was not published.

    Its process holds a lock on it, by which `prune` recognises the folders of killed exports: they have none.

    Raises:
        BadInput: The name of the model is invalid in a path or URL, or the folder cannot be written.
    """
    if not MODEL_NAME.fullmatch(model.name):
        raise BadInput(
            f"--to {model}: the model name {model.name!r} is invalid; use letters, digits, dots, dashes and underscores"
        )
    try:
        model.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=STAGING, dir=model))
    except OSError as error:
        raise BadInput(f"--to {model} cannot be written: {error.strerror}") from None
    folder.chmod(0o755)  # mkdtemp permits only its owner to read it; a server may run as another user
    lock = _lock(folder)
    try:
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
    """Remove old versions of a model, except labelled ones, and the staging folders of killed exports.

    Args:
        model: REPOSITORY/NAME.
        keep: Number of highest versions to keep, at least 1.

    Yields:
        Each removed folder.
    """
    labelled = labels(model).values()
    for number in [number for number in versions(model)[:-keep] if number not in labelled]:
        # Renamed first, so that nobody sees an incomplete version.
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
    """Lock a folder until the returned descriptor is closed or the process ends; None if another process holds it."""
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
