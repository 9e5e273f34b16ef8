"""One virtual environment per peer, since their requirements conflict with each other and with ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.peers.catalog import Peer
from resnet import BadInput

UV = [sys.executable, "-m", "uv"]
RECORD = "requirements.txt"  # written last: an environment without it is incomplete


def set_up(peer: Peer, folder: Path) -> None:
    """Install the requirements of a peer into `folder`/NAME, unless they are installed.

    Raises:
        BadInput: The installation failed.
    """
    environment = folder / peer.name
    if not peer.requirements or _read_record(peer, folder) == list(peer.requirements):
        return
    _run(*UV, "venv", "--clear", "--no-python-downloads", "--python", sys.executable, str(environment))
    _run(*UV, "pip", "install", "--python", str(environment / "bin" / "python"), *peer.requirements)
    (environment / RECORD).write_text("".join(f"{line}\n" for line in peer.requirements))


def find_python(peer: Peer, folder: Path) -> Path:
    """Return the Python interpreter of a peer.

    Raises:
        BadInput: Its environment is missing, or has other versions.
    """
    if not peer.requirements:
        return Path(sys.executable)
    if _read_record(peer, folder) != list(peer.requirements):
        raise BadInput(f"not installed; run `python -m benchmarks.peers setup {peer.name}`")
    return folder / peer.name / "bin" / "python"


def _read_record(peer: Peer, folder: Path) -> list[str]:
    path = folder / peer.name / RECORD
    return path.read_text().splitlines() if path.exists() else []


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadInput(f"{last_line(done.stderr)} (from `{' '.join(command[1:4])}`)")


def last_line(text: str) -> str:
    """Return the last line of a program's output, which usually says why it ended."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")
