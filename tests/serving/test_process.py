"""The process of `resnet serve`: its signals, its output, and what a closed terminal does to it."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resnet import cli
from serving import app, logs
from serving.client import Client
from serving.errors import NotFound, Unavailable
from tests.conftest import edit_manifest
from tests.serving.test_app import SERVE
from tests.serving.test_logs import STUCK as HANGING

IMAGE = np.zeros((1, 32, 32, 3), np.uint8)
PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

# Loading says so and never ends.
STUCK = """
import sys, threading
from resnet import cli
from serving.models import loader
def stuck(*_):
    print("loading", flush=True)
    threading.Event().wait()
loader.load = stuck
sys.exit(cli.main(["serve", *sys.argv[1:]]))
"""


def test_a_server_that_still_loads_ends_at_once(repository: Path) -> None:
    """It has accepted nothing, so that is success."""
    process = subprocess.Popen([sys.executable, "-c", STUCK, str(repository), "--port=0"], **PIPES)
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("", "", 0)


def test_a_storm_of_signals_hides_no_sigterm(repository: Path) -> None:
    """Without a watch too, where nothing wakes the main thread but signals."""
    process = subprocess.Popen([*SERVE, str(repository), "--port=0", "--watch=0", "--no-tune"], **PIPES)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("serving on"):
        pass
    for _ in range(1000):
        process.send_signal(signal.SIGHUP)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_closed_terminal_changes_nothing(own_repository: Path) -> None:
    """New versions are loaded, and SIGTERM ends the server with 0, though no line can be written."""
    process = subprocess.Popen([*SERVE, str(own_repository), "--port=0", "--watch=0", "--no-tune"], **PIPES)
    assert process.stdout is not None
    assert process.stderr is not None
    while not (line := process.stdout.readline()).startswith("serving on"):
        pass
    process.stdout.close()
    process.stderr.close()
    digits = own_repository / "digits"
    shutil.copytree(digits / "1", digits / ".copy")
    edit_manifest(digits / ".copy", lambda content: content.update(version=2))
    (digits / ".copy").rename(digits / "2")
    process.send_signal(signal.SIGHUP)
    with Client(line.removeprefix("serving on ").strip()) as client:
        while True:  # until the version is loaded
            try:
                assert client.classify(IMAGE, model="digits", version=2).version == 2
                break
            except NotFound:
                pass
    process.terminate()
    assert process.wait(timeout=30) == 0


class _Watched:
    """A repository whose next look is asked for during the first and the second one; the second fails."""

    def __init__(self) -> None:
        self.wake, self.looked = threading.Event(), threading.Semaphore(0)
        self.scans = 0
        self.retries: list[bool] = []

    def scan(self, retry: bool) -> None:
        """Count."""
        self.scans += 1
        self.retries.append(retry)
        self.looked.release()
        if self.scans < 3:
            self.wake.set()
        if self.scans == 2:
            raise OSError("stale file handle")


def test_what_is_asked_for_during_a_scan_is_done_after_it() -> None:
    """Also if the scan failed."""
    watched: Any = _Watched()
    threading.Thread(target=app._follow, args=(watched, watched.wake, 0), daemon=True).start()
    watched.wake.set()
    assert all(watched.looked.acquire(timeout=10) for _ in range(3))
    assert watched.retries == [True, True, True]


@pytest.mark.parametrize("style", ["human", "json"])
def test_a_sentence_is_written_in_any_locale(style: str, tmp_path: Path) -> None:
    """What Python cannot decode there is escaped."""
    escaped = r"n\udcc3\udcaf" if style == "human" else "n\udcc3\udcaf"
    for locale, shown in (("C", escaped), ("C.UTF-8", "nï")):
        variables = os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        command = [*SERVE, os.fsencode(tmp_path / "nï"), "--log-format", style]
        ended = subprocess.run(command, env=variables, capture_output=True, check=False)
        assert ended.returncode == 2
        (line,) = ended.stderr.decode().splitlines()
        sentence = json.loads(line)["message"] if style == "json" else line
        assert sentence.startswith("resnet serve: ")
        assert f"{shown} does not exist" in sentence


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """On stdout as well, where Python would end with a traceback."""
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["serve", "nï", "--print-config"]) == 0
    stream.seek(0)
    assert r'repository = "n\xef"' in stream.read()


def make_record(message: str) -> logging.LogRecord:
    """Return a record to log."""
    return logging.makeLogRecord({"levelname": "INFO", "name": "n", "msg": message, "exc_info": None})


def test_a_line_that_cannot_be_written_is_dropped() -> None:
    """Its handler raises nothing, says nothing, and keeps nothing for later."""
    reading, writing = os.pipe()
    handler = logs.LineHandler(writing, logging.Formatter(), "ascii")
    handler.handle(make_record("é"))
    assert os.read(reading, 1000) == rb"\xe9" + b"\n"
    os.close(reading)
    handler.handle(make_record("to nobody"))
    os.close(writing)
    handler.handle(make_record("to nowhere"))


def test_nobody_waits_for_who_does_not_read() -> None:
    """A full pipe takes no line; once it is read, it takes the next ones, long ones too."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", 0) as reader, os.fdopen(writing, "wb", 0):
        handler = logs.LineHandler(writing, logging.Formatter(), "ascii")
        for _ in range(1000):
            handler.handle(make_record("x" * 999))
        assert set(reader.read(2**20).splitlines()) == {b"x" * 999}
        handler.handle(make_record("y" * 9999))
        assert reader.read(2**20) == b"y" * 9999 + b"\n"


def test_a_stop_does_not_wait_for_an_engine_that_hangs(repository: Path) -> None:
    """Longer than the grace: its caller is told to go elsewhere, and the process ends with 0."""
    code = HANGING.replace("--grace=600", "--grace=0.2")
    process = subprocess.Popen([sys.executable, "-c", code, str(repository)], **PIPES)
    assert process.stdout is not None
    process.stdout.readline()
    address = process.stdout.readline().removeprefix("serving on ").strip()
    with Client(address, retries=0) as client, ThreadPoolExecutor() as pool:
        calling = pool.submit(client.classify, IMAGE)
        assert process.stdout.readline() == "computing\n"
        process.terminate()
        with pytest.raises(Unavailable):
            calling.result(30)
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_telemetry_of_libraries_is_off_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every command, before it imports anything."""
    for given, found in ((None, "1"), ("0", "0")):
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
        if given:
            monkeypatch.setenv("ORT_DISABLE_TELEMETRY", given)
        assert cli.main(["serve", "nowhere"]) == 2
        assert os.environ["ORT_DISABLE_TELEMETRY"] == found


def test_no_command_leaves_telemetry_on_disk(repository: Path, tmp_path: Path) -> None:
    """In the cache folder, where onnxruntime would keep a database and an id of the device."""
    variables = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    del variables["ORT_DISABLE_TELEMETRY"]
    command = [sys.executable, "-m", "resnet", "tune", str(repository / "digits")]
    subprocess.run(command, env=variables, capture_output=True, check=True)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["resnet"]


def test_a_server_may_open_as_many_files_as_the_system_allows() -> None:
    """Not only the usual 1024, which silent connections could use up."""
    code = """
import resource
from serving import process
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
process.prepare()
print(resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


def test_a_server_that_may_open_too_few_files_is_told_at_the_start(repository: Path) -> None:
    """Before a library fails that needs one."""
    code = """
import resource, sys
from resnet import cli
resource.setrlimit(resource.RLIMIT_NOFILE, (63, 63))
sys.exit(cli.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, "serve", str(repository), "--port=0"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert process.returncode == 2
    assert process.stderr == "resnet serve: the server may open only 63 files; allow at least 64, with ulimit -n\n"


# Memory that is kept for requests is given back on demand.
FREED = """
import os
from pathlib import Path
import numpy as np
from serving import process
def read():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
process.prepare()
arrays = [np.ones(2**17) for _ in range(200)]
del arrays
before = read()
process.release_memory()
print(before - read())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps memory so")
def test_freed_memory_is_given_back() -> None:
    """Most of 200 MB; without that, each model that is loaded adds to what the server holds."""
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 150
