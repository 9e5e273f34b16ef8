"""The process that answers with the Keras original: its frames, its manners, and what it says of its faults."""

from __future__ import annotations

import io
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export import answering, manifest
from export.answering import ANSWER, IMAGES
from export.manifest import Manifest
from resnet import BadInput, CheckFailed
from tests.versions import list_file, write_version

FRAME = IMAGES.pack(2, 4, 4, 3) + bytes(2 * 4 * 4 * 3)
ANSWERING = [sys.executable, "-m", "export.answering"]

# Its library prints where answers belong, and reports how the system schedules it.
NOISY = """
import os, sys
import numpy as np
from export import answering
{change}
def load(folder, recorded):
    print("loaded")
    os.system("echo started a program")
    print(os.sched_getscheduler(0) == os.SCHED_IDLE, os.getpriority(os.PRIO_PROCESS, 0))
    print(open("/proc/self/oom_score_adj").read())
    return lambda images: np.zeros((len(images), 3), np.float32)
answering.load = load
answering.main()
"""
FORBIDDEN = """
def forbid(*_):
    raise PermissionError
os.sched_setscheduler = forbid
"""

# It says which process it is, and is never loaded.
LOADING = """
import os, threading
from export import answering
def load(*_):
    print(os.getpid(), flush=True)
    threading.Event().wait()
answering.load = load
answering.main()
"""
STARTER = "import subprocess, sys; subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE).wait()"


@pytest.fixture
def small_network() -> None:
    """Nothing is trained here."""


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """The folder of a version, with a file in the place of the Keras original that is none."""
    folder = write_version(tmp_path / "models" / "colors" / "1")
    list_file(folder, "model.keras", b"model")
    return folder


@pytest.fixture
def recorded(version: Path) -> Manifest:
    """Its manifest."""
    return manifest.read(version)


def pack(images: NDArray[np.uint8]) -> bytes:
    """Return a frame of images."""
    return IMAGES.pack(*images.shape) + images.tobytes()


def unpack(answers: bytes) -> list[NDArray[np.float32]]:
    """Return the answers of some frames."""
    found = []
    while answers:
        shape = ANSWER.unpack_from(answers)
        end = ANSWER.size + 4 * shape[0] * shape[1]
        found.append(np.frombuffer(answers[ANSWER.size : end], "<f4").reshape(shape))
        answers = answers[end:]
    return found


def average(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Answer the mean of each of three colours, or of grey."""
    return np.broadcast_to(images.mean(axis=(1, 2), dtype=np.float32), (len(images), 3))


def answer_all(version: Path, digest: str, frames: bytes = FRAME, code: str = "") -> subprocess.CompletedProcess[bytes]:
    """Run the process, or code in its place, with these frames."""
    command = [sys.executable, "-c", code] if code else ANSWERING
    return subprocess.run([*command, version, digest], input=frames, capture_output=True, check=False)


def test_frames_are_answered_in_turn(recorded: Manifest) -> None:
    """After an answer to no images; batches and images may have any size, and colours or none."""
    random, answers = np.random.default_rng(0), io.BytesIO()
    batches = [random.integers(0, 256, (n, 2 + n, 5, channels), np.uint8) for n, channels in ((3, 3), (1, 1), (2, 3))]
    answering.answer(io.BytesIO(b"".join(map(pack, batches))), answers, average, recorded)
    loaded, *found = unpack(answers.getvalue())
    assert loaded.shape == (0, 3)
    for batch, answer in zip(batches, found, strict=True):
        np.testing.assert_array_equal(answer, average(batch))


@pytest.mark.parametrize("end", [1, IMAGES.size, -1])
def test_it_ends_with_its_input(recorded: Manifest, end: int) -> None:
    """In the middle of a frame too, which is not answered."""
    answers = io.BytesIO()
    answering.answer(io.BytesIO(FRAME + FRAME[:end]), answers, average, recorded)
    assert [len(answer) for answer in unpack(answers.getvalue())] == [0, 2]


def test_what_cannot_be_computed_is_said_in_a_sentence(recorded: Manifest) -> None:
    """With the first line of the library's error; answers of another number of classes are none."""

    def fail(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        raise RuntimeError(f"no memory\nfor {len(images)} images")

    with pytest.raises(CheckFailed, match=r"^a batch of shape \[2, 4, 4, 3\] cannot be computed \(no memory\)$"):
        answering.answer(io.BytesIO(FRAME), io.BytesIO(), fail, recorded)
    with pytest.raises(BadInput, match=r"has 3 labels for an output of shape \[2, 2\]"):
        answering.answer(io.BytesIO(FRAME), io.BytesIO(), lambda images: average(images)[:, :2], recorded)


@pytest.mark.slow
@pytest.mark.parametrize(("change", "manners"), [("", [b"True 0"]), (FORBIDDEN, [b"False 19"])])
def test_nothing_but_answers_is_on_stdout(version: Path, recorded: Manifest, change: str, manners: list[bytes]) -> None:
    """What libraries print goes to stderr. The process gives way to all others, as far as the system lets it."""
    done = answer_all(version, recorded.digest, code=NOISY.format(change=change))
    assert [len(answer) for answer in unpack(done.stdout)] == [0, 2]
    assert sorted(done.stderr.splitlines()) == sorted([b"loaded", b"started a program", *manners, b"1000", b""])
    assert done.returncode == 0


@pytest.mark.slow
def test_it_ends_with_who_started_it(version: Path, recorded: Manifest) -> None:
    """Also while it loads, and if that process had no time to say so."""
    command = [sys.executable, "-c", LOADING, str(version), recorded.digest]
    with subprocess.Popen([sys.executable, "-c", STARTER, *command], stderr=subprocess.PIPE) as starter:
        assert starter.stderr
        descriptor = os.pidfd_open(int(starter.stderr.readline()))
        starter.kill()
    assert select.select([descriptor], [], [], 30)[0]
    os.close(descriptor)


@pytest.mark.slow
def test_it_does_not_load_for_nobody(version: Path, recorded: Manifest) -> None:
    """Who started it may end even before it can ask for that."""
    done = answer_all(version, recorded.digest, frames=b"", code=LOADING)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda folder: (folder / "model.keras").unlink(), "model.keras cannot be read (No such file or directory)"),
        (
            lambda folder: (folder / "model.keras").write_bytes(b"other"),
            "model.keras is not the file that was exported",
        ),
        (lambda folder: list_file(folder, "model.keras", b"other"), "colors/1 was replaced by another version"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json is not a valid manifest"),
    ],
    ids=["missing", "changed", "exchanged", "no manifest"],
)
def test_only_the_original_of_the_version_is_loaded(
    version: Path, recorded: Manifest, tamper: Callable[[Path], object], message: str
) -> None:
    """What else is in its place is a line on stderr, before TensorFlow is loaded."""
    tamper(version)
    done = answer_all(version, recorded.digest)
    assert (done.returncode, done.stdout) == (2, b"")
    assert message in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_file_that_keras_cannot_load_is_a_line(version: Path, recorded: Manifest) -> None:
    """Neither a traceback, nor TensorFlow's notes."""
    done = answer_all(version, recorded.digest)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == f"error: {version}/model.keras cannot be loaded (File is not a zip file)\n"


def test_the_original_answers(
    repository: Path, heldout: tuple[NDArray[np.uint8], NDArray[np.int32]], probabilities: NDArray[np.float32]
) -> None:
    """As it did when it was exported, in batches of any size; stderr stays empty."""
    folder, images = repository / "digits" / "1", heldout[0]
    frames = b"".join(map(pack, (images[:1], images[1:4], images[4:40])))
    done = answer_all(folder, manifest.read(folder).digest, frames)
    assert (done.returncode, done.stderr) == (0, b"")
    np.testing.assert_allclose(np.concatenate(unpack(done.stdout)), probabilities[:40], atol=1e-5)
