"""The inspection of a version before anything of it is loaded: it may hold only what its manifest declares.

Export, `resnet verify` and the server refuse the same. A SavedModel and a .keras file are code, and not looked into.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Hashable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from export import files, graph, manifest, triton
from export.manifest import Manifest

# All that an export writes. TensorFlow leaves `assets` empty: a classifier of images has no vocabulary.
NAME = re.compile(
    r"model\.keras|model(\.[a-z0-9]+)?\.onnx|saved_model\.pb|fingerprint\.pb|variables/variables\.(index|data-\d+-of-\d+)"
    r"|reference\.npz|labels\.txt|check\.py|[a-z-]+\.intoto\.json"
)


def find_problems(folder: Path, recorded: Manifest) -> Iterator[str]:
    """Yield a clause for whatever makes a version another than its manifest describes, or more than a model.

    These are files that are missing, were changed or added, or are not of a version; what Triton would read beside the
    versions (`export.triton.changed_files`); and if there is none of them, what `export.graph.find_faults` finds in the
    ONNX files.

    Args:
        folder: REPOSITORY/NAME/VERSION.
        recorded: Its manifest.

    Raises:
        BadInput: A file changes meanwhile.
    """
    is_unchanged = True
    for problem in chain(_find_files(folder, recorded), triton.changed_files(recorded, folder.parent)):
        is_unchanged = False
        yield problem
    for name in sorted(name for name in recorded.files if is_unchanged and name.endswith(".onnx")):
        content = manifest.read_file(folder, name, recorded)
        for fault in graph.find_faults(content, recorded.input, recorded.output):
            yield f"{folder / name} {fault}"


def fingerprint(folder: Path) -> Hashable:
    """Return a value that changes when anything does that `find_problems` looks at; file contents are not read."""
    return files.fingerprint(folder, *triton.list_paths(folder.parent))


def _find_files(folder: Path, recorded: Manifest) -> Iterator[str]:
    """Yield a clause for each file that is not as the manifest says, or not one of those that a version has."""
    if folder.is_symlink():
        yield f"{folder} is a link, a version is a folder of its own"
        return
    yield from manifest.changed_files(folder, recorded)
    with suppress(OSError):  # it is named above
        if files.read(folder / "labels.txt") != triton.make_labels(recorded):
            yield f"{folder / 'labels.txt'} has other class names than the manifest"
    for name in (manifest.SIGNATURE, manifest.OLD_SIGNATURE):
        path = folder / name
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            yield f"{path} is not a file"
    certified = {variant.path for variant in recorded.certificate.variants}
    for name in sorted(recorded.files):
        if not NAME.fullmatch(name) or (name.endswith(".onnx") and name not in certified):
            yield f"{str(folder / name)!r} has no place in a version"
