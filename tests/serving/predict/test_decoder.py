"""Decoding in processes: order, errors, and processes that are killed."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness.tree import ProcessTree
from resnet import BadInput
from serving.predict.decoder import IMAGES_EACH, DecodedImages, DecoderPool, FileContents, FileDecoder
from tests.serving.predict.data import FILES, PIXELS
from tests.versions import SIDE
from training.images import decode

DECODER = FileDecoder((SIDE, SIDE, 3), "bilinear")
ENDED = "a process that decodes images ended with SIGKILL; if memory was short, free some, and run the same command"
PARENT = f"""
from serving.predict.decoder import DecoderPool, FileDecoder
pool = DecoderPool(FileDecoder(({SIDE}, {SIDE}, 3), "bilinear"), 1000, 2)
pool.submit([]).result()
print("started", flush=True)
input()
"""


class LocalError(Exception):
    """An error that cannot be pickled, as those of some libraries."""

    def __reduce__(self) -> str:
        raise TypeError


@pytest.fixture
def files(tmp_path: Path) -> FileContents:
    """The ten images, of which the second is broken and the last is a file; then what cannot be read."""
    first, _, *others, last = FILES.values()
    (tmp_path / "last.png").write_bytes(last)
    return [first, b"", *others, tmp_path / "last.png", tmp_path / "missing.png", LocalError("no token")]


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    """Two processes."""
    pool = DecoderPool(DECODER, 2 * IMAGES_EACH, 2)
    yield pool
    pool.close()


def check(decoded: DecodedImages, missing: Path) -> None:
    """Check the decoded `files`."""
    pixels, errors = decoded
    np.testing.assert_array_equal(pixels, np.delete(PIXELS, 1, axis=0))
    assert errors == {
        1: "is empty (0 bytes)",
        10: f"{missing} cannot be read (No such file or directory)",
        11: "cannot be read (no token)",
    }


def test_few_images_are_decoded_here(files: FileContents, tmp_path: Path) -> None:
    """No process is worth its start; so it is for many on one core, and there may be no core for it at all."""
    before = ProcessTree(os.getpid()).pids()
    for images, cores in ((0, 16), (2 * IMAGES_EACH - 1, 16), (10**6, 1), (10**6, 0)):
        pool = DecoderPool(DECODER, images, cores)
        assert pool.size == 1
        check(pool.submit(files).result(), tmp_path / "missing.png")
        assert ProcessTree(os.getpid()).pids() == before
        pool.close()


def test_large_images_are_handed_over_in_small_numbers() -> None:
    """So that memory does not depend on their size."""
    for side, expected in ((32, 64), (224, 13), (4096, 1)):
        assert DecoderPool(FileDecoder((side, side, 3), "bilinear"), 0, 1).images_at_once == expected


@pytest.mark.parametrize("channels", [1, 4])
def test_images_get_the_channels_of_the_model(channels: int) -> None:
    """As the server decodes them."""
    (file, *_), shape = FILES.values(), (SIDE, SIDE, channels)
    ((pixels,), errors) = FileDecoder(shape, "bilinear").decode([file])
    np.testing.assert_array_equal(pixels, decode(file, channels=channels))
    assert not errors


@pytest.mark.slow
def test_processes_answer_in_order(pool: DecoderPool, files: FileContents, tmp_path: Path) -> None:
    """With the same pixels and errors, also to nothing, and to what is all broken."""
    answers = [pool.submit(some) for some in (files, [], [b"", b"x"], *([content] for content in FILES.values()))]
    everything, nothing, broken, *single = (answer.result() for answer in answers)
    assert pool.size == 2
    check(everything, tmp_path / "missing.png")
    assert (nothing[0].shape, nothing[1]) == ((0, SIDE, SIDE, 3), {})
    assert (broken[0].shape, len(broken[1])) == ((0, SIDE, SIDE, 3), 2)
    np.testing.assert_array_equal(np.concatenate([pixels for pixels, _ in single]), PIXELS)


@pytest.mark.slow
def test_a_killed_process_is_one_sentence(pool: DecoderPool, files: FileContents) -> None:
    """Whether it was idle, or waited for."""
    for process in pool._processes:
        os.kill(process._process.pid, signal.SIGKILL)
    for answer in [pool.submit(files) for _ in range(4)]:
        with pytest.raises(BadInput, match=ENDED):
            answer.result()


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them() -> None:
    """However that ends."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == b"started\n"
        watched = [os.pidfd_open(pid) for pid in ProcessTree(parent.pid).pids()[1:]]
        assert len(watched) == 2
        parent.kill()
    for descriptor in watched:
        assert select.select([descriptor], [], [], 10)[0]
        os.close(descriptor)


@pytest.mark.slow
def test_a_process_loads_little() -> None:
    """Neither a runtime nor a protocol."""
    code = "import sys, serving.predict.decoder; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split()
    assert not {"onnxruntime", "grpc", "google", "msgspec", "fsspec", "pyarrow", "export", "protos"} & set(loaded)
