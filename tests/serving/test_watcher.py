"""Versions come and go under a server that answers all the while."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray

from serving import models
from serving.client import Client
from serving.server import Limits, Server
from serving.watcher import Watcher
from tests.conftest import edit_manifest
from tests.serving.test_command import SERVE

Heldout = tuple[NDArray[np.uint8], NDArray[np.int32]]


def add(repository: Path, number: int, name: str = "digits") -> Path:
    """Publish the same model once more, under another number or name."""
    staged = repository / name / ".copy"
    shutil.copytree(repository / "digits" / "1", staged)
    edit_manifest(staged, lambda content: content.update(version=number, model=name))
    return staged.rename(repository / name / str(number))


class Watched:
    """A server of a repository, which is looked at on demand."""

    def __init__(self, repository: Path) -> None:
        load = partial(models.load, device="cpu", max_batch=32, max_queue=1024)
        self.models = models.Models([load(repository / "digits" / "1")])
        self.watcher = Watcher(repository, self.models, load)
        self.repository = repository


@pytest.fixture
def watched(own_repository: Path) -> Watched:
    """Its only model is digits/1."""
    return Watched(own_repository)


@pytest.fixture
def address(watched: Watched) -> Iterator[str]:
    """Where it answers."""
    with Server(watched.models, "127.0.0.1", 0, Limits()) as server:
        yield server.address


def test_versions_are_followed_up_and_back(watched: Watched, address: str, heldout: Heldout) -> None:
    """A new one takes over, a removed one gives way, a new model appears, the last version of one takes it along."""
    with Client(address) as client:

        def answering(model: str = "digits") -> int:
            return client.classify(heldout[0][:1], model=model).version

        assert answering() == 1
        second = add(watched.repository, 2)
        watched.watcher.scan()
        assert answering() == 2
        shutil.rmtree(second)
        watched.watcher.scan()
        assert answering() == 1
        add(watched.repository, 5, "numbers")
        watched.watcher.scan()
        assert (answering(), answering("numbers")) == (1, 5)
        shutil.rmtree(watched.repository / "numbers")
        watched.watcher.scan()
        with pytest.raises(Exception, match="no model 'numbers'"):
            answering("numbers")


def test_a_version_that_does_not_hold_is_refused_and_the_old_one_stays(
    watched: Watched, address: str, heldout: Heldout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is in the index; it is not tried again, and the next good version takes over."""
    with (add(watched.repository, 2) / "model.onnx").open("ab") as file:
        file.write(b"x")
    watched.watcher.scan()
    with Client(address) as client, triton.InferenceServerClient(address) as other:
        assert client.classify(heldout[0][:1]).version == 1
        ready, refused = other.get_model_repository_index().models
        assert (ready.version, ready.state) == ("1", "READY")
        assert (refused.version, refused.state) == ("2", "UNAVAILABLE")
        assert "is not the file that was exported" in refused.reason
        with monkeypatch.context() as patch:
            patch.setattr(watched.watcher, "_load", None)  # calling it would fail
            watched.watcher.scan()
        add(watched.repository, 3)
        watched.watcher.scan()
        assert client.classify(heldout[0][:1]).version == 3
        assert [model.state for model in other.get_model_repository_index().models] == ["READY"]


def test_a_repository_that_is_gone_takes_nothing_away(watched: Watched, address: str, heldout: Heldout) -> None:
    """As while its disk is mounted anew."""
    watched.repository.rename(watched.repository.with_name("away"))
    watched.watcher.scan()
    with Client(address) as client:
        assert client.classify(heldout[0][:1]).version == 1


@pytest.mark.slow
def test_reloads_under_load_fail_no_request(
    watched: Watched, address: str, heldout: Heldout, probabilities: NDArray[np.float32]
) -> None:
    """Every answer is right and of a version that was there; each caller sees versions in order."""
    stop = threading.Event()
    seen: list[list[int]] = [[] for _ in range(4)]
    problems: list[Exception] = []

    def ask(versions: list[int]) -> None:
        with Client(address) as client:
            while not stop.is_set():
                try:
                    answer = client.classify(heldout[0][:2], top_k=1)
                except Exception as error:
                    problems.append(error)
                    return
                versions.append(answer.version)
                best = [classes[0].index for classes in answer.images]
                if best != probabilities[:2].argmax(axis=1).tolist():
                    problems.append(AssertionError(f"{best} is wrong"))

    threads = [threading.Thread(target=ask, args=(versions,)) for versions in seen]
    for thread in threads:
        thread.start()
    for number in range(2, 22):
        add(watched.repository, number)
        watched.watcher.scan()
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems
    assert all(versions == sorted(versions) for versions in seen)
    assert len({version for versions in seen for version in versions}) > 10


def test_a_signal_looks_for_versions_at_once(own_repository: Path) -> None:
    """`resnet serve` says that it loaded one."""
    command = [*SERVE, str(own_repository), "--port=0", "--watch=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("loaded digits/1")
    assert process.stdout.readline().startswith("serving on ")
    add(own_repository, 2)
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline().startswith("loaded digits/2")
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 0
