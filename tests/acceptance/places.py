"""Train, export and serve in awkward places: each command succeeds, or says in one sentence why it cannot.

The disk is full in an export, in training and in the tuning cache; the home folder is missing or read-only; files are
written with umask 077 and served by another user; the locale is ASCII; one core is allowed, or half of one. No command
may end with a traceback or leave files behind that it did not finish. What needs root is skipped without it. The last
line of the output is one JSON object.

Examples:
  python -m tests.acceptance.places demo/models --run demo/runs/digits
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.process import serve
from export import repository
from resnet import BadInput, CheckFailed, cli
from resnet.table import render
from tests.acceptance.arguments import expect
from tests.acceptance.messages import ModelUnderTest
from tests.acceptance.users import NOBODY, without_privileges
from tests.acceptance.versions import publish
from tests.acceptance.witness import Witness, is_serving

RESNET = [sys.executable, "-m", "resnet"]
MINUTES = 5.0  # for a command
CODES = (0, 1, 2)  # of commands that end by themselves
HEADER = ("place", "outcome")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
CPU_CGROUP = Path("/sys/fs/cgroup/cpu")


class Place(NamedTuple):
    """A place, and what is done there.

    Attributes:
        title: The place in words.
        work: Works there, and returns the outcome in words; raises `Skipped` where it cannot be made.
    """

    title: str
    work: Callable[[], str]


class Skipped(Exception):
    """A place that cannot be made on this machine, or by this user."""


def main() -> None:
    """Work in each place, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.acceptance.places",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("repository", type=Path, help="a model repository")
    parser.add_argument("--run", type=Path, required=True, help="a run folder")
    parser.add_argument("--only", default="", help="text in the name of a place; the others are left out")
    args = parser.parse_args()
    print(json.dumps(work_everywhere(args.repository.resolve(), args.run.resolve(), args.only)))


def work_everywhere(models: Path, run: Path, only: str = "") -> dict[str, object]:
    """Work in each place; return the number of places, and what was skipped.

    Raises:
        CheckFailed: A command did not end as it should.
    """
    rows: list[list[str]] = []
    failed: list[str] = []
    skipped: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        work = _Work(ModelUnderTest(models), models, run, Path(temporary))
        for place in _list_places(work):
            if only not in place.title:
                continue
            try:
                outcome = place.work()
            except Skipped as reason:
                outcome = f"SKIPPED: {reason}"
                skipped[f"{place.title} ({reason})"] += 1
            except (CheckFailed, BadInput) as error:
                outcome = f"FAILED: {error}"
                failed.append(place.title)
            rows.append([place.title, " ".join(outcome.split())[:300]])
            print(": ".join(rows[-1]), flush=True)
    print(f"\n{render(HEADER, rows, left=2)}\n")
    expect(not failed, f"{len(failed)} of {len(rows)} failed: {', '.join(failed)}")
    return {"places": len(rows) - len(skipped)} | ({"SKIPPED": ", ".join(skipped)} if skipped else {})


class _Work:
    """The model and the folders that all places share."""

    def __init__(self, model: ModelUnderTest, models: Path, run: Path, folder: Path) -> None:
        self.model, self.models, self.run, self._folder = model, models, run, folder
        self._number = 0

    def make_folder(self) -> Path:
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        return folder

    def serve(
        self,
        models: Path | None = None,
        *options: str,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        cores: int | None = None,
    ) -> str:
        """Serve until a request is answered; return the last line of the log, or why the server did not start."""
        options = options or ("--no-tune",)
        with serve(models or self.models, *options, prefix=prefix, environment=environment) as server:
            try:
                address = server.address
            except BadInput as error:
                _check_sentence(server.wait(1), str(error))
                return f"refused: {error}"
            with Witness(address, self.model.classify()):
                pass
            if cores is not None:
                found = _count_cores(prefix)
                expect(found == cores, f"{found} cores are counted, not {cores}")
        expect("Traceback" not in "".join(server.errors), "".join(server.errors)[-500:])
        return "served"


def _list_places(work: _Work) -> Iterator[Place]:
    yield from _list_full_disks(work)
    yield from _list_homes(work)
    yield Place("files of umask 077, another user", lambda: _serve_private_files(work))
    yield Place("an ASCII locale", lambda: work.serve(environment=ASCII))
    yield Place("an ASCII locale, resnet models", lambda: _list_in_ascii(work))
    yield Place("one core by affinity", lambda: work.serve(prefix=["taskset", "-c", _first_core()], cores=1))
    yield Place("half a core by quota", lambda: _serve_with_quota(work))


def _list_full_disks(work: _Work) -> Iterator[Place]:
    def export(megabytes: int) -> str:
        with _small_disk(work.make_folder(), megabytes) as disk:
            outcome = _run("export", str(work.run), "--to", str(disk / "digits"), code=2)
            left = [path for path in disk.rglob("*") if path.is_file() or path.name.startswith(repository.STAGING)]
            expect(not left, f"{len(left)} files are left over, as {left[:1]}: {outcome}")
            return outcome

    def train() -> str:
        with _small_disk(work.make_folder(), 1) as disk:
            options = ("--data", "digits", "--model", "resnet20", "--epochs", "1")
            return _run("train", *options, "--out", str(disk / "run"), code=2)

    def tune() -> str:
        with _small_disk(work.make_folder(), 1) as disk:
            cache = disk / "cache"
            cache.mkdir()
            fill(disk)
            outcome = work.serve(None, "--max-batch=4", environment={"XDG_CACHE_HOME": str(cache)})
            left = [path for path in cache.rglob("*") if path.is_file()]
            expect(not left, f"{left} are left over")
            return outcome

    def fill(disk: Path) -> None:
        try:
            (disk / "full").write_bytes(bytes(2**20))
        except OSError:
            return

    yield Place("a full disk, export, 1 MB", lambda: export(1))
    yield Place("a full disk, export, 4 MB", lambda: export(4))
    yield Place("a full disk, train", train)
    yield Place("a full disk, tuning cache", tune)


def _list_homes(work: _Work) -> Iterator[Place]:
    def read_only() -> str:
        if os.getuid() == 0 and not without_privileges():
            raise Skipped("root writes everywhere without setpriv")
        home = work.make_folder()
        home.chmod(0o500)
        return work.serve(None, "--max-batch=4", prefix=without_privileges(), environment=_as_home(home))

    yield Place(
        "a missing home", lambda: work.serve(None, "--max-batch=4", environment=_as_home(Path("/nonexistent/home")))
    )
    yield Place("a read-only home", read_only)
    yield Place("a file as home", lambda: work.serve(None, "--max-batch=4", environment=_as_home(Path("/dev/null"))))


def _as_home(home: Path) -> dict[str, str]:
    return {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}


def _serve_private_files(work: _Work) -> str:
    """Export with umask 077, give the files to another user, and serve them as one who may not read them."""
    if os.getuid() or not without_privileges():
        raise Skipped("it needs root and setpriv")
    models = work.make_folder()
    _run("export", str(work.run), "--to", str(models / work.model.name), umask=0o077)
    for path in (models, *models.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    models.chmod(0o755)
    with serve(models, "--no-tune", prefix=without_privileges()) as server, suppress(BadInput):  # it may have ended
        expect(not is_serving(server.address), "it serves files that only their owner may read")
    reason = "".join(server.errors)
    expect("Permission denied" in reason and "Traceback" not in reason, f"the reason is missing: {reason[-300:]}")
    return f"not served: {next(line for line in server.errors if 'Permission denied' in line)}"


def _list_in_ascii(work: _Work) -> str:
    """List a model whose labels are not ASCII."""
    models = work.make_folder() / work.model.name
    models.mkdir()
    publish(work.model.folder, models / "1", labels=[f"é{number}" for number in range(len(work.model.manifest.labels))])
    return _run("models", "show", str(models), environment=ASCII, code=0)


def _serve_with_quota(work: _Work) -> str:
    group = CPU_CGROUP / f"resnet-acceptance-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise Skipped(f"cgroups: {error.strerror}") from None
    try:
        (group / "cpu.cfs_period_us").write_text("100000")
        (group / "cpu.cfs_quota_us").write_text("50000")
        join = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        return work.serve(prefix=join, cores=1)
    finally:
        group.rmdir()


def _count_cores(prefix: Sequence[str]) -> int:
    code = "from serving.runtimes.cores import count_cores; print(count_cores())"
    return int(subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def _run(
    *arguments: str, environment: Mapping[str, str] | None = None, umask: int = -1, code: int | None = None
) -> str:
    """Run `resnet`; return the last line of its error output, or of its output.

    Raises:
        CheckFailed: It had a traceback, another exit code than `code`, or did not end.
    """
    try:
        process = subprocess.run(
            [*RESNET, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **(environment or {})},
            umask=umask,
            timeout=60 * MINUTES,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"it runs for more than {MINUTES:.0f} minutes") from None
    _check_sentence(process.returncode, process.stderr)
    text = (process.stderr or process.stdout).strip()
    if code is not None:
        expect(process.returncode == code, f"it ended with {process.returncode}, not {code}: {text[-300:]}")
    last = text.splitlines()[-1] if text else "no output"
    return f"exit code {process.returncode}: {re.sub(r'/tmp/[^ ]*/', '', last)}"


def _check_sentence(code: int, text: str) -> None:
    expect(code in CODES, f"it ended with {code}: {text[-300:]}")
    expect("Traceback" not in text, f"a traceback: {text[-300:]}")


@contextmanager
def _small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """Mount a file system of a few megabytes in memory.

    Raises:
        Skipped: This user may not.
    """
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        raise Skipped("it needs a user who may mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _first_core() -> str:
    return str(min(os.sched_getaffinity(0)))


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
