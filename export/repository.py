"""The model repository: REPOSITORY/NAME/VERSION, where VERSION is an integer and the highest is the latest."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from resnet import BadInput

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def versions(model: Path) -> list[int]:
    """Return the version numbers in the folder of a model, ascending."""
    if not model.is_dir():
        return []
    return sorted(int(path.name) for path in model.iterdir() if path.name.isdecimal() and path.is_dir())


def latest(model: Path) -> Path:
    """Return the folder of the highest version.

    Raises:
        BadInput: There is none.
    """
    found = versions(model)
    if not found:
        raise BadInput(f"{model} holds no model version; `resnet export ... --to {model}` makes one")
    return model / str(found[-1])


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

    Raises:
        BadInput: The name of the model is not fit for a folder and a URL, or the folder cannot be written.
    """
    if not MODEL_NAME.fullmatch(model.name):
        raise BadInput(
            f"--to {model}: a model's name has letters, digits, dots, dashes and underscores, not {model.name!r}"
        )
    try:
        model.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".staging-", dir=model))
    except OSError as error:
        raise BadInput(f"--to {model} cannot be written: {error.strerror}") from None
    folder.chmod(0o755)  # mkdtemp keeps it to its owner; a server may run as somebody else
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
