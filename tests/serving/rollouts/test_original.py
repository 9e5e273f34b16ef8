"""The Keras original in another process: its answers, and all the ways in which a process can fail."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.harness.process import serve
from export import manifest
from protos import admin_pb2
from protos.admin_pb2_grpc import AdminStub
from resnet import BadInput
from serving.client import Client
from serving.rollouts import original
from serving.rollouts.original import OriginalError, OriginalProcess
from serving.runtimes.base import Images, Probabilities
from tests.versions import list_file, write_version

IMAGES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
LARGE = np.zeros((64, 224, 224, 3), np.uint8)  # more than a socket holds

# A process that is loaded, and then does what a test says; `read` and `write` are frames.
CHILD = """
import os, struct, sys, time
import numpy as np
def read():
    shape = struct.unpack("<4I", sys.stdin.buffer.read(16))
    return np.frombuffer(sys.stdin.buffer.read(np.prod(shape)), np.uint8).reshape(shape)
def write(answers):
    sys.stdout.buffer.write(struct.pack("<2I", *answers.shape) + answers.astype("<f4").tobytes())
    sys.stdout.buffer.flush()
write(np.zeros((0, 3)))
"""
AVERAGE = "write(read().mean(axis=(1, 2)))"


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """The folder of a version with a file in the place of the Keras original."""
    folder = write_version(tmp_path / "models" / "colors" / "1")
    list_file(folder, "model.keras", b"model")
    return folder


def wait_for_answers(process: OriginalProcess, images: Images) -> Probabilities:
    """Compute images as soon as the original is loaded."""
    while (answers := process.compute(images)) is None:
        pass
    return answers


class FakeOriginals:
    """Code that runs in the place of the original, and how often it was started."""

    def __init__(self, version: Path, patch: pytest.MonkeyPatch) -> None:
        self.process = OriginalProcess(version, manifest.read(version))
        self._patch, self._log = patch, version.parents[2] / "started"

    def run(self, code: str, load: str = "") -> None:
        """Run this code from the next start on, once it is loaded by the code `load`."""
        start = f"open({str(self._log)!r}, 'a').write('.')\n{load}\n"
        self._patch.setattr(original, "COMMAND", (sys.executable, "-c", start + CHILD + code))

    @property
    def starts(self) -> int:
        """Number of processes so far."""
        return len(self._log.read_text())

    def compute(self, images: Images = IMAGES) -> Probabilities:
        """Return the answers to images."""
        return wait_for_answers(self.process, images)

    def fail(self, images: Images = IMAGES) -> str:
        """Return why images cannot be computed."""
        with pytest.raises(OriginalError) as caught:
            self.compute(images)
        return str(caught.value).removeprefix("the Keras original of colors/1 ")


@pytest.fixture
def fake(version: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOriginals]:
    """An original that is no Keras model."""
    fake = FakeOriginals(version, monkeypatch)
    yield fake
    fake.process.close()


@pytest.mark.slow
def test_a_server_compares_with_the_original(
    repository: Path, heldout: tuple[NDArray[np.uint8], NDArray[np.int32]]
) -> None:
    """All its answers are those of the original."""
    with (
        serve(repository, "--shadow=digits=original", "--no-tune", "--prove=off", "--log-level=warning") as server,
        Client(server.address) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        compared, pause = 0, threading.Event()
        while compared < 10:
            client.classify(heldout[0][:3])
            pause.wait(0.05)  # the original loads and computes in idle time, which a loop without pause leaves none of
            status = AdminStub(channel).GetStatus(admin_pb2.GetStatusRequest()).models[0].shadow
            assert (status.other, status.percent, status.failed, status.problem) == ("original", 100, 0, "")
            compared = status.agreement.images
    assert status.agreement.same == status.agreement.images
    assert status.agreement.max_difference < 1e-5
    assert not server.errors


def test_one_process_answers_many_times(fake: FakeOriginals) -> None:
    """Images need not lie in memory one after the other."""
    fake.run(f"while True: {AVERAGE}")
    for images in (IMAGES, IMAGES[:, ::2, ::2], IMAGES[:1], LARGE):
        np.testing.assert_allclose(fake.compute(images), images.mean(axis=(1, 2)), rtol=1e-6)
    assert fake.starts == 1


def test_nobody_waits_while_it_loads(fake: FakeOriginals, tmp_path: Path) -> None:
    """The images have to, in the meantime."""
    os.mkfifo(tmp_path / "load")
    fake.run(AVERAGE, load=f"open({str(tmp_path / 'load')!r}).read()")
    assert fake.process.compute(IMAGES) is None
    assert fake.process.compute(IMAGES) is None
    (tmp_path / "load").write_text("")
    np.testing.assert_allclose(fake.compute(), IMAGES.mean(axis=(1, 2)))
    assert fake.starts == 1


def test_one_that_is_never_loaded_is_killed(fake: FakeOriginals, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end."""
    monkeypatch.setattr(original, "START_SECONDS", 0)
    fake.run("", load="import time; time.sleep(60)")
    assert fake.fail() == "was not loaded in 0 s"


@pytest.mark.parametrize("missing", ["keras", "tensorflow"])
def test_keras_must_be_installed(fake: FakeOriginals, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever asks for the comparison is told so, before any process starts."""
    monkeypatch.setattr(original, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(BadInput, match=f"needs {missing}; install resnet with its extra 'original'"):
        fake.process.check()


def test_the_version_must_have_an_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its manifest."""
    monkeypatch.setattr(original, "find_spec", lambda _: object())
    folder = write_version(tmp_path / "colors" / "1")
    with pytest.raises(BadInput, match="colors/1 has no Keras original; export the model again"):
        OriginalProcess(folder, manifest.read(folder)).check()


def test_the_server_loads_neither_keras_nor_tensorflow() -> None:
    """Not by importing what starts the process."""
    code = "import sys, serving.rollouts.original as _; print({'keras', 'tensorflow'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_only_the_served_version_is_loaded(version: Path) -> None:
    """Another one in its folder is not."""
    process = OriginalProcess(version, manifest.read(version))
    list_file(version, "model.keras", b"other")
    with pytest.raises(OriginalError, match=r"colors/1 ended with exit code 2: .*/colors/1 was replaced"):
        wait_for_answers(process, IMAGES)


def test_a_package_of_the_same_name_is_not_run(version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server was started, anything may lie."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "__init__.py").write_text("raise SystemExit('mine')")
    monkeypatch.chdir(tmp_path)
    (version / "model.keras").unlink()
    with pytest.raises(OriginalError, match="model.keras cannot be read"):
        wait_for_answers(OriginalProcess(version, manifest.read(version)), IMAGES)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("sys.exit(3)", "ended with exit code 3: no message"),
        (
            "read(); print('warning\\nerror: no memory\\n', file=sys.stderr); sys.exit(1)",
            "ended with exit code 1: no memory",
        ),
        ("read(); os.kill(os.getpid(), 9)", "ended with SIGKILL: no message"),
        (f"{AVERAGE}; print('late'); sys.exit(0)", "ended with exit code 0: no message"),
        ("read(); write(np.zeros((1, 3)))", "gave an answer of shape [1, 3], not [2, 3]"),
        ("read(); write(np.zeros((2, 4)))", "gave an answer of shape [2, 4], not [2, 3]"),
        ("read(); print('answers')", "gave an answer of shape [2004053601, 175338085], not [2, 3]"),
    ],
)
def test_what_ended_it_is_said(fake: FakeOriginals, code: str, reason: str) -> None:
    """With the last line of its error output; and again, until it may start again."""
    fake.run(code)
    if code.startswith(AVERAGE):
        fake.compute()
    assert fake.fail() == reason
    assert fake.fail() == reason
    assert fake.starts == 1


def test_one_that_only_closes_its_output_is_killed(fake: FakeOriginals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it."""
    monkeypatch.setattr(original, "END_SECONDS", 0.1)
    fake.run("os.close(0); os.close(1); time.sleep(60)")
    assert fake.fail() == "closed its output"


def test_it_starts_again_after_a_pause(fake: FakeOriginals, monkeypatch: pytest.MonkeyPatch) -> None:
    """And answers as if nothing had been."""
    monkeypatch.setattr(original, "PAUSE_SECONDS", 0)
    fake.run("read(); sys.exit(1)")
    fake.fail()
    fake.run(AVERAGE)
    np.testing.assert_allclose(fake.compute(), IMAGES.mean(axis=(1, 2)))
    assert fake.starts == 2


@pytest.mark.parametrize(
    ("code", "images", "reason"),
    [
        ("read(); time.sleep(60)", IMAGES, "gave no answer in 0.2 s"),
        ("time.sleep(60)", LARGE, "took no images in 0.2 s"),
    ],
)
def test_one_that_hangs_is_killed(
    fake: FakeOriginals, code: str, images: NDArray[np.uint8], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it has read the images or not."""
    monkeypatch.setattr(original, "ANSWER_SECONDS", 0.2)
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **rest: started.append(popen(*args, **rest)) or started[-1])
    fake.run(code)
    assert fake.fail(images) == reason
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_one_that_cannot_be_started_is_an_error(fake: FakeOriginals, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no further process is allowed."""
    monkeypatch.setattr(original, "COMMAND", ("/nowhere/python",))
    monkeypatch.setattr(original, "PAUSE_SECONDS", 0)
    assert fake.fail() == "cannot be started (No such file or directory)"

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(original, "TemporaryFile", refuse)
    assert fake.fail() == "cannot be started (Too many open files)"


def test_the_environment_is_for_one_thread_and_no_gpu(fake: FakeOriginals) -> None:
    """The server may use both."""
    fake.run("read(); sys.exit('{CUDA_VISIBLE_DEVICES}|{TF_NUM_INTRAOP_THREADS}'.format_map(os.environ))")
    assert fake.fail() == "ended with exit code 1: |1"


def test_closing_interrupts_a_computation(fake: FakeOriginals, tmp_path: Path) -> None:
    """A server that ends does not wait for it, and has no failure to report."""
    os.mkfifo(tmp_path / "computes")
    fake.run(f"read(); open({str(tmp_path / 'computes')!r}, 'w').close(); time.sleep(60)")
    with ThreadPoolExecutor() as threads:

        def compute() -> Probabilities | None:
            while (answers := fake.process.compute(IMAGES)) is None and not fake.process._closed:
                pass
            return answers

        answers = threads.submit(compute)
        (tmp_path / "computes").read_text()
        fake.process.close()
        assert answers.result() is None
    assert fake.process.compute(IMAGES) is None
    assert fake.process._child is None
