"""A server with all its processes, as Linux tells of them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")
PARENT, SESSION, CPU = 1, 3, slice(11, 15)  # among the fields of stat from the third on


class ProcessTree:
    """A process with its descendants and, if it leads a session, those whose parents have ended."""

    def __init__(self, root: int) -> None:
        """Look after the process of this number."""
        self._root = root

    def pids(self) -> list[int]:
        """Return the processes that there are now, the root before all others."""
        stats = {int(folder.name): read_stat(int(folder.name)) for folder in PROC.glob("[0-9]*")}
        found = [pid for pid, fields in stats.items() if fields and self._root in (pid, int(fields[SESSION]))]
        found.sort(key=self._root.__ne__)
        for parent in found:
            found += [
                pid for pid, fields in stats.items() if fields and int(fields[PARENT]) == parent and pid not in found
            ]
        return found

    def cpu_seconds(self) -> float:
        """Return the processor time that the processes have used, in seconds."""
        return sum(map(read_cpu_seconds, self.pids()))

    def memory_bytes(self) -> int:
        """Return what the processes occupy; a page that several share is counted once."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                found = re.search(r"^Pss:\s+(\d+) kB", (PROC / str(pid) / "smaps_rollup").read_text(), re.MULTILINE)
                total += 1024 * int(found[1]) if found else 0
        return total

    def pause(self) -> None:
        """Stop the processes where they are: idle ones are not to take anything from those that are measured."""
        _signal(self.pids(), signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        _signal(reversed(self.pids()), signal.SIGCONT)

    def end(self, patience: float) -> None:
        """End the root with SIGTERM, and after `patience` seconds whatever is left with SIGKILL."""
        pids = self.pids()
        self.resume()
        _signal(pids[:1], signal.SIGTERM)
        end = time.monotonic() + patience
        while alive := [pid for pid in pids if _lives(pid)]:
            if time.monotonic() >= end:
                _signal(alive, signal.SIGKILL)
            time.sleep(0.02)


def read_stat(pid: int) -> list[str]:
    """Return the fields of a process' state from the third on; none if it is gone."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def read_cpu_seconds(pid: int) -> float:
    """Return the processor time that a process, and those it has seen end, have used; 0 if it is gone."""
    return sum(map(int, read_stat(pid)[CPU])) / TICKS


def read_peak_bytes(pid: int) -> int:
    """Return the largest resident set of a process; 0 if it is gone."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", (PROC / str(pid) / "status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def _lives(pid: int) -> bool:
    return read_stat(pid)[:1] not in ([], ["Z"])


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
