"""Commands that run another one with fewer rights than root has."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

NOBODY = 65534


def without_privileges() -> list[str]:
    """Return the command that runs another one as this user, who may do no more than the files' modes say.

    Empty for any user but root, and without `setpriv`.
    """
    if os.getuid() or not shutil.which("setpriv"):
        return []
    lost = "-dac_override,-dac_read_search,-fowner"
    return ["setpriv", f"--bounding-set={lost}", f"--inh-caps={lost}"]


def as_nobody() -> list[str]:
    """Return the command that runs another one as the user `nobody`, who may read all files; empty if it cannot be run.

    Limits on the number of processes do not count for root. An interpreter in root's home is read by it all the same.
    """
    if os.getuid() or not shutil.which("setpriv"):
        return []
    kept = "+dac_read_search"
    return [
        "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", f"--inh-caps={kept}",
        f"--ambient-caps={kept}",
    ]  # fmt: skip


def give_to_nobody(*paths: Path) -> None:
    """Make `nobody` the owner of files and folders, with all that is in them."""
    for path in paths:
        for each in (path, *path.rglob("*")):
            os.chown(each, NOBODY, NOBODY, follow_symlinks=False)
