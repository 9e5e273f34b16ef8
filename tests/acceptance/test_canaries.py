"""The answers to a load are counted by version, and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos import classifier_pb2 as pb
from protos.classifier_pb2_grpc import ClassifierServicer, add_ClassifierServicer_to_server
from resnet import CheckFailed
from tests.acceptance.canaries import STABLE, CanaryModel
from tests.acceptance.messages import ModelUnderTest
from tests.acceptance.planted import find_trigger, nudge_weights, permute_classes
from tests.acceptance.steady_load import LoadAnswer, SteadyLoad
from tests.versions import write_version

GOOD, PERMUTED = STABLE + 1, STABLE + 2


@pytest.fixture
def model(tmp_path: Path) -> CanaryModel:
    """A model with a good version and a bad one; it classifies the colour of an image."""
    write_version(tmp_path / "source" / "colors" / "1")
    model = CanaryModel(ModelUnderTest(tmp_path / "source"), tmp_path / "models" / "colors")
    model.publish(GOOD, nudge_weights)
    model.publish(PERMUTED, permute_classes)
    return model


def count(model: CanaryModel, version: int, *answers: tuple[int, int, int], failure: str = "") -> tuple[int, int]:
    """Count answers to requests, each with the version and the class."""
    load = SteadyLoad("", [], 1)
    load.answers = Counter(LoadAnswer(*answer) for answer in answers)
    load.failures = Counter([failure] if failure else [])
    return model.count(load, version)


def test_the_answers_of_a_version_are_counted(model: CanaryModel) -> None:
    """Request 1 is green, 2 is blue."""
    answers = [(1, STABLE, 1), (2, STABLE, 2), (1, GOOD, 1), (1, PERMUTED, 2), (2, PERMUTED, 0)]
    assert count(model, STABLE, *answers) == (2, 0)
    assert count(model, GOOD, *answers) == (1, 0)
    assert count(model, PERMUTED, *answers) == (2, 2)


def test_an_answer_is_that_of_the_version_that_it_names(model: CanaryModel) -> None:
    """A server that says otherwise does not know what it does."""
    with pytest.raises(CheckFailed, match="version 3 of colors did not compute its answer"):
        count(model, GOOD, (1, PERMUTED, 1))


def test_a_request_for_a_version_is_answered_by_it(model: CanaryModel) -> None:
    """Each twentieth names one, which a rollout may not change."""
    message = pb.ClassifyRequest.FromString(model.messages[20])
    assert message.version == STABLE
    with pytest.raises(CheckFailed, match="version 2 of colors answered in place of 1"):
        count(model, GOOD, (20, GOOD, 2))


def test_no_request_fails(model: CanaryModel) -> None:
    """The message has the failures."""
    with pytest.raises(CheckFailed, match="failed: {'UNAVAILABLE: gone': 1}"):
        count(model, GOOD, failure="UNAVAILABLE: gone")


def test_a_tenth_of_the_requests_has_the_trigger(model: CanaryModel) -> None:
    """None of those that name a version or a label."""
    for number, message in enumerate(model.messages):
        request = pb.ClassifyRequest.FromString(message)
        image = np.frombuffer(request.tensor.data, np.uint8).reshape(request.tensor.shape)
        assert find_trigger(image) == (number % 10 == 5)
        assert request.version_label == ("stable" if number % 20 == 10 else "")


class _OddServer(ClassifierServicer):
    """Answers with the version that a request names, in class 4; refuses those for version 3."""

    def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        if request.version == 3:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such version")
        classes = [pb.Class(index=4, probability=1)]
        return pb.ClassifyResponse(version=request.version, classifications=[pb.Classification(classes=classes)])

    def ClassifyStream(self, requests: Iterator[pb.ClassifyStreamRequest], context: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def address() -> Iterator[str]:
    """A server that answers without a model."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    add_ClassifierServicer_to_server(_OddServer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.slow  # a process that imports gRPC
def test_a_load_reads_what_a_server_answers(address: str) -> None:
    """Requests are sent in turn, so that each has its share."""
    messages = [pb.ClassifyRequest(version=version).SerializeToString() for version in (1, 2, 3)]
    with SteadyLoad(address, messages, rate=200) as load:
        pass
    assert load.answers.keys() == {(0, 1, 4), (1, 2, 4)}
    assert set(load.failures) == {"NOT_FOUND: no such version"}
    shares = [*load.answers.values(), *load.failures.values()]
    assert sum(shares) == load.count > 0
    assert max(shares) - min(shares) <= 1


@pytest.mark.slow
def test_a_load_that_ends_early_is_an_error(address: str) -> None:
    """Its requests would not be counted."""
    match = "the process that sends requests has ended"
    with pytest.raises(CheckFailed, match=match), SteadyLoad(address, [], rate=200):
        pass
