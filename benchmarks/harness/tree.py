"""A process with all its descendants: their CPU time, their memory, and signals to them, by Linux' /proc."""

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
PARENT, SESSION, CPU = 1, 3, slice(11, 15)  # indices of the fields of /proc/PID/stat, from the third on


class ProcessTree:
    """A process with its descendants and, if it leads a session, those whose parents have ended."""

    def __init__(self, root: int) -> None:
        """Take the process with this id as the root."""
        self._root = root

    def pids(self) -> list[int]:
        """Return the ids of the living processes, the root first."""
        stats = {int(folder.name): read_stat(int(folder.name)) for folder in PROC.glob("[0-9]*")}
        pids = [pid for pid, fields in stats.items() if fields and self._root in (pid, int(fields[SESSION]))]
        pids.sort(key=self._root.__ne__)
        for parent in pids:
            pids += [
                pid for pid, fields in stats.items() if fields and int(fields[PARENT]) == parent and pid not in pids
            ]
        return pids

    def cpu_seconds(self) -> float:
        """Return the CPU time of the processes, in seconds."""
        return sum(map(read_cpu_seconds, self.pids()))

    def memory_bytes(self) -> int:
        """Return the memory of the processes in bytes; a page that several share is counted once."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                match = re.search(r"^Pss:\s+(\d+) kB", (PROC / str(pid) / "smaps_rollup").read_text(), re.MULTILINE)
                total += 1024 * int(match[1]) if match else 0
        return total

    def pause(self) -> None:
        """Suspend the processes, so that they use no CPU time while others are measured."""
        _send_signal(self.pids(), signal.SIGSTOP)

    def resume(self) -> None:
        """Resume the processes."""
        _send_signal(reversed(self.pids()), signal.SIGCONT)

    def end(self, patience: float) -> None:
        """End the root with SIGTERM, and after `patience` seconds all processes still alive with SIGKILL."""
        pids = self.pids()
        self.resume()
        _send_signal(pids[:1], signal.SIGTERM)
        end = time.monotonic() + patience
        while alive := [pid for pid in pids if _is_alive(pid)]:
            if time.monotonic() >= end:
                _send_signal(alive, signal.SIGKILL)
            time.sleep(0.02)


def read_stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on; none if the process is gone."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def read_cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its ended children, in seconds; 0 if the process is gone."""
    return sum(map(int, read_stat(pid)[CPU])) / TICKS


def read_peak_bytes(pid: int) -> int:
    """Return the peak resident memory of a process in bytes; 0 if the process is gone."""
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB", (PROC / str(pid) / "status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(match[1]) if match else 0


def _is_alive(pid: int) -> bool:
    return read_stat(pid)[:1] not in ([], ["Z"])


def _send_signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
