"""Versions come and go under a server that answers all the while."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray
from tensorflow_serving.apis import get_model_status_pb2, model_service_pb2_grpc
from tritonclient.utils import InferenceServerException

from export import repository as repositories
from resnet import BadInput, cli
from serving.client import Client
from serving.config import Compute, Limits
from serving.models import loader, registry, version_policy
from serving.models.version_policy import ALL, VersionPolicy
from serving.models.watcher import Watcher
from serving.server import Server
from tests.conftest import edit_manifest
from tests.heldout import Heldout
from tests.serving.test_app import SERVE


def add(repository: Path, number: int, name: str = "digits") -> Path:
    """Publish the same model once more, under another number or name."""
    staged = repository / name / ".copy"
    shutil.copytree(repository / "digits" / "1", staged)
    edit_manifest(staged, lambda content: content.update(version=number, model=name))
    return staged.rename(repository / name / str(number))


class Watched:
    """A server of a repository, which is looked at on demand."""

    def __init__(self, repository: Path) -> None:
        load = partial(loader.load, compute=Compute(device="cpu", tune=False))
        self.models = registry.ModelRegistry([load(repository / "digits" / "1")])
        self.watcher = Watcher(repository, self.models, load, {"pinned": VersionPolicy(listed=(1, 3))})
        self.repository = repository


@pytest.fixture
def watched(own_repository: Path) -> Watched:
    """Its only model is digits/1."""
    return Watched(own_repository)


@pytest.fixture
def address(watched: Watched) -> Iterator[str]:
    """Where it answers."""
    with Server(watched.models, "127.0.0.1", 0, Limits(), repository=watched.watcher) as server:
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
        states = [(model.version, model.state) for model in other.get_model_repository_index().models]
        assert states == [("3", "READY"), ("2", "UNAVAILABLE")]


def test_a_repository_that_is_gone_takes_nothing_away(watched: Watched, address: str, heldout: Heldout) -> None:
    """As while its disk is mounted anew."""
    watched.repository.rename(watched.repository.with_name("away"))
    watched.watcher.scan()
    with Client(address) as client:
        assert client.classify(heldout[0][:1]).version == 1


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("", [3]),
        ("latest", [3]),
        ("latest:2", [2, 3]),
        ("all", [1, 2, 3]),
        ("1,3,9", [1, 3]),
        ("all digits=2 cats=latest", [2]),
    ],
)
def test_policies_choose_versions(text: str, chosen: list[int]) -> None:
    """One with a name counts for that model alone."""
    policies = version_policy.parse(text)
    assert policies.get("digits", policies[""]).choose([1, 2, 3]) == chosen


@pytest.mark.parametrize("text", ["newest", "latest:0", "latest:x", "1,,2", "digits=", "-1"])
def test_a_policy_that_chooses_nothing_is_one_sentence(text: str) -> None:
    """Of what may be written."""
    with pytest.raises(BadInput, match="chooses no versions; write latest, latest:N, all, or numbers"):
        version_policy.parse(text)


@pytest.mark.parametrize(("text", "whose"), [("1 2", "all other models"), ("digits=1 all digits=2", "digits")])
def test_a_model_has_one_policy(text: str, whose: str) -> None:
    """Of two, nobody knows which is meant."""
    with pytest.raises(BadInput, match=f"'{text}' has two policies for {whose}; write one"):
        version_policy.parse(text)


def test_several_versions_are_served_as_the_policy_says(watched: Watched, address: str, heldout: Heldout) -> None:
    """The latest of them answers where none is named, in every protocol."""
    for number in (1, 2, 3):
        add(watched.repository, number, "pinned")
    watched.watcher.scan()
    with (
        Client(address) as client,
        triton.InferenceServerClient(address) as other,
        grpc.insecure_channel(address) as channel,
    ):
        assert client.classify(heldout[0][:1], model="pinned").version == 3
        assert client.classify(heldout[0][:1], model="pinned", version=1).version == 1
        with pytest.raises(Exception, match="version 2 of model 'pinned' is not served; served versions: 1, 3"):
            client.classify(heldout[0][:1], model="pinned", version=2)
        assert list(other.get_model_metadata("pinned").versions) == ["1", "3"]
        asked = get_model_status_pb2.GetModelStatusRequest()
        asked.model_spec.name = "pinned"
        found = model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(asked).model_version_status
        assert [(status.version, status.state) for status in found] == [(1, 30), (3, 30)]


def test_labels_name_versions_and_keep_them(
    watched: Watched, address: str, heldout: Heldout, capsys: pytest.CaptureFixture[str]
) -> None:
    """A version with a label is served beside the latest, answers to it, and is not pruned; labels move at once."""
    model = watched.repository / "digits"
    add(watched.repository, 2)
    add(watched.repository, 3)
    pixels = triton.InferInput("image", [1, 32, 32, 3], "UINT8").set_data_from_numpy(heldout[0][:1])

    def label(*words: str) -> int:
        return cli.main(["models", "label", str(model), *words])

    with triton.InferenceServerClient(address) as client:

        def answering(version: str) -> str:
            return str(client.infer("digits", [pixels], model_version=version).get_response().model_version)

        assert label("stable", "1") == label("canary", "3") == 0
        watched.watcher.scan()
        assert [answering(version) for version in ("", "stable", "canary")] == ["1", "1", "3"]
        assert label("stable", "2") == 0
        watched.watcher.scan()
        assert [answering(version) for version in ("", "stable", "canary")] == ["2", "2", "3"]
        assert cli.main(["models", "prune", str(model), "--keep", "1"]) == 0
        assert repositories.versions(model) == [2, 3]
        assert label("canary") == 0
        watched.watcher.scan()
        with pytest.raises(InferenceServerException, match="no version label 'canary'.*its labels are: stable"):
            answering("canary")
    assert "digits/2 is stable" in capsys.readouterr().out
    assert label("7", "2") == label("a/b", "2") == label("stable", "9") == label("canary") == 2


def test_models_are_loaded_and_unloaded_on_request(watched: Watched, address: str, heldout: Heldout) -> None:
    """As Triton's client asks; `config` chooses versions, which is how to roll back."""
    pixels = triton.InferInput("image", [1, 32, 32, 3], "UINT8").set_data_from_numpy(heldout[0][:1])
    with triton.InferenceServerClient(address) as client:

        def state() -> list[tuple[str, str, str]]:
            found = client.get_model_repository_index().models
            return [(model.version, model.state, model.reason) for model in found]

        add(watched.repository, 2)
        client.load_model("digits")
        assert state() == [("2", "READY", "")]
        client.load_model("digits", config='{"version_policy": {"specific": {"versions": [1]}}}')
        assert state() == [("1", "READY", "")]
        watched.watcher.scan()
        assert client.infer("digits", [pixels]).get_response().model_version == "1"
        client.unload_model("digits")
        watched.watcher.scan()
        assert state() == [("1", "UNAVAILABLE", "unloaded by request")]
        with pytest.raises(InferenceServerException, match=r"NOT_FOUND.*no model 'digits'; this server has none"):
            client.infer("digits", [pixels])
        client.load_model("digits", config='{"version_policy": {"all": {}}}')
        assert [version for version, _, _ in state()] == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "config", "code", "message"),
    [
        ("cats", None, "NOT_FOUND", "the repository has no model 'cats'; it has digits"),
        ("../models/digits", None, "NOT_FOUND", "the repository has no model"),
        ("digits", "{", "INVALID_ARGUMENT", "no model configuration in JSON"),
        ("digits", '{"max_batch_size": 3}', "INVALID_ARGUMENT", "takes version_policy alone"),
        ("digits", '{"version_policy": {"latest": {}}}', "INVALID_ARGUMENT", "takes version_policy alone"),
        ("digits", '{"version_policy": {"specific": {"versions": [7]}}}', "FAILED_PRECONDITION", "chooses none"),
    ],
)
def test_what_cannot_be_loaded_is_said(name: str, config: str | None, code: str, message: str, address: str) -> None:
    """And what was served still is."""
    with triton.InferenceServerClient(address) as client:
        with pytest.raises(InferenceServerException, match=f"{code}.*{message}"):
            client.load_model(name, config=config)
        with pytest.raises(InferenceServerException, match=r"UNIMPLEMENTED.*takes no parameter 'file:1/model.onnx'"):
            client.load_model("digits", config="{}", files={"file:1/model.onnx": b"x"})
        with pytest.raises(InferenceServerException, match=r"NOT_FOUND.*model 'cats' is not served"):
            client.unload_model("cats")
        assert client.is_model_ready("digits")


def test_a_version_that_was_mended_is_tried_again_on_request(watched: Watched, address: str) -> None:
    """A broken one is FAILED_PRECONDITION, with the reason."""
    broken = add(watched.repository, 2)
    graph = (broken / "model.onnx").read_bytes()
    (broken / "model.onnx").write_bytes(graph[:-1])
    with triton.InferenceServerClient(address) as client:
        with pytest.raises(InferenceServerException, match=r"FAILED_PRECONDITION.*version 2 of model 'digits' is not"):
            client.load_model("digits")
        assert client.is_model_ready("digits", "1")
        (broken / "model.onnx").write_bytes(graph)
        client.load_model("digits")
        assert client.is_model_ready("digits", "2")


def test_health_is_told_of_each_model(watched: Watched, address: str) -> None:
    """Whoever watches one learns of it as it happens."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="digits"), timeout=30)
        states = (response.status for response in watch)
        assert next(states) == health_pb2.HealthCheckResponse.SERVING
        watched.watcher.unload("digits")
        assert next(states) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watched.watcher.load("digits", ALL)
        assert next(states) == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


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
        while not problems and not any(number in versions[-1:] for versions in seen):
            time.sleep(0)  # gives way to the callers
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems
    assert all(versions == sorted(versions) for versions in seen)


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
