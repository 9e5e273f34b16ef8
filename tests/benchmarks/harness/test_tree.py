"""The processes of a server are found, stopped and ended together."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.harness.tree import ProcessTree, read_stat

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)"])
child.wait()
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    """A process that leads a session and has a child, both running."""
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        ProcessTree(process.pid).end(patience=0)


def test_a_tree_has_the_descendants(process: subprocess.Popen[str]) -> None:
    """The root comes first; processor time and memory are those of both."""
    tree = ProcessTree(process.pid)
    root, child = tree.pids()
    assert root == process.pid
    assert tree.memory_bytes() > ProcessTree(child).memory_bytes() > 0
    assert tree.cpu_seconds() >= ProcessTree(child).cpu_seconds()


def test_a_tree_keeps_a_child_whose_parent_has_ended(process: subprocess.Popen[str]) -> None:
    """It is of the session still, and can be ended."""
    tree = ProcessTree(process.pid)
    _, child = tree.pids()
    process.kill()
    process.wait()
    assert tree.pids() == [child]
    tree.end(patience=10)
    assert read_stat(child)[:1] in ([], ["Z"])


def test_a_paused_tree_stands_still(process: subprocess.Popen[str]) -> None:
    """All of it, until it is let go on; T is Linux's letter for a process that was stopped."""
    tree = ProcessTree(process.pid)
    pids = tree.pids()
    tree.pause()
    while {read_stat(pid)[0] for pid in pids} != {"T"}:  # a signal takes its time; the test has a limit
        pass
    tree.resume()
    while "T" in {read_stat(pid)[0] for pid in pids}:
        pass


def test_ending_a_paused_tree_ends_it(process: subprocess.Popen[str]) -> None:
    """Stopped processes would not see the signal."""
    tree = ProcessTree(process.pid)
    pids = tree.pids()
    tree.pause()
    tree.end(patience=0)
    process.wait()
    assert all(read_stat(pid)[:1] in ([], ["Z"]) for pid in pids)
