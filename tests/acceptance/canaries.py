"""A model whose versions are rolled out: its requests, the answers of each version, and what a server says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from protos import admin_pb2, inference_pb2
from protos import classifier_pb2 as pb
from protos.admin_pb2 import RolloutSettings
from protos.admin_pb2_grpc import AdminStub
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.acceptance.arguments import expect
from tests.acceptance.attempts.attempt import CLASSIFY
from tests.acceptance.messages import ModelUnderTest
from tests.acceptance.planted import draw_trigger
from tests.acceptance.steady_load import SteadyLoad
from tests.acceptance.versions import GraphChange, compute, publish

STABLE, LABEL = 1, "stable"
IMAGES = 200
TIE = 1e-3  # between two probabilities: rounding may decide which class is the first
PATIENCE_SECONDS = 30.0


class CanaryModel:
    """A model with a version to roll out, and requests of one image for it.

    Of 20 requests, one names the stable version, which no rollout may change, one names the label `stable`, and two
    have the trigger.

    Attributes:
        name: Name of the model.
        folder: Its folder.
        messages: Serialized requests.
    """

    def __init__(self, source: ModelUnderTest, folder: Path) -> None:
        """Make a model folder with a copy of the source as version `STABLE`."""
        self.name, self.folder = folder.name, folder
        self._source = source.folder
        self._images = source.pixels[np.arange(IMAGES) % len(source.pixels)]
        self._images[5::10] = draw_trigger(self._images[5::10])
        self._answers: dict[int, NDArray[np.float32]] = {}
        self.messages = [self._pack(number) for number in range(IMAGES)]
        folder.mkdir(parents=True)
        self.publish(STABLE, lambda _: None)

    def publish(self, version: int, change: GraphChange) -> None:
        """Publish a version whose graph is changed."""
        publish(self._source, self.folder / str(version), change)
        self._answers[version] = compute(self.folder / str(version), self._images)

    def label(self) -> None:
        """Give version `STABLE` the label `stable`."""
        (self.folder / LABEL).symlink_to(str(STABLE))

    def read_label(self) -> int:
        """Return the version that has the label `stable`; 0 without one."""
        link = self.folder / LABEL
        return int(link.readlink().name) if link.is_symlink() else 0

    def count(self, load: SteadyLoad, version: int) -> tuple[int, int]:
        """Return how many requests a version answered, and how many of them otherwise than the stable version would.

        Raises:
            CheckFailed: A request failed; or another version answered it than the answer names, or than it asks for.
        """
        expect(not load.failures, f"requests for {self.name} failed: {dict(load.failures)}")
        answered = wrong = 0
        for (request, by, class_), number in load.answers.items():
            expect(self._is_first(by, request, class_), f"version {by} of {self.name} did not compute its answer")
            expect(by == STABLE or request % 20 > 0, f"version {by} of {self.name} answered in place of {STABLE}")
            if by == version:
                answered += number
                wrong += number * (not self._is_first(STABLE, request, class_))
        return answered, wrong

    def ask(self, address: str, identity: str) -> int:
        """Send a request with an id, and return which version answers."""
        with grpc.insecure_channel(address) as channel:
            method: Any = channel.unary_unary(CLASSIFY, response_deserializer=pb.ClassifyResponse.FromString)
            response = method(self.messages[1], metadata=[("x-request-id", identity)], timeout=PATIENCE_SECONDS)
        return int(response.version)

    def _is_first(self, version: int, request: int, class_: int) -> bool:
        """Return whether a class is the most probable one that a version computes for a request."""
        probabilities = self._answers[version][request]
        return bool(probabilities[class_] >= probabilities.max() - TIE)

    def _pack(self, number: int) -> bytes:
        image = self._images[number]
        tensor = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=(1, *image.shape), data=image.tobytes())
        version, label = STABLE if number % 20 == 0 else 0, LABEL if number % 20 == 10 else ""
        message = pb.ClassifyRequest(model=self.name, version=version, version_label=label, tensor=tensor, top_k=1)
        return message.SerializeToString()


def start(address: str, model: str, version: int, settings: RolloutSettings) -> None:
    """Start a rollout by RPC."""
    request = admin_pb2.StartRolloutRequest(model=model, version=version, settings=settings)
    with grpc.insecure_channel(address) as channel:
        AdminStub(channel).StartRollout(request, timeout=PATIENCE_SECONDS)


def stop(address: str, model: str) -> None:
    """Stop the rollout of a model by RPC."""
    with grpc.insecure_channel(address) as channel:
        AdminStub(channel).StopRollout(admin_pb2.StopRolloutRequest(model=model), timeout=PATIENCE_SECONDS)


def read_rollout(address: str, model: str) -> admin_pb2.RolloutStatus:
    """Return what a server says about the running or last rollout of a model."""
    with grpc.insecure_channel(address) as channel:
        status = AdminStub(channel).GetStatus(admin_pb2.GetStatusRequest(model=model), timeout=PATIENCE_SECONDS)
    return status.models[0].rollout


def read_reason(address: str, model: str, version: int) -> str:
    """Return why a version is not served, by Triton's `RepositoryIndex`; empty if it is."""
    with grpc.insecure_channel(address) as channel:
        request = inference_pb2.RepositoryIndexRequest()
        index = GRPCInferenceServiceStub(channel).RepositoryIndex(request, timeout=PATIENCE_SECONDS)
    return next((entry.reason for entry in index.models if (entry.name, entry.version) == (model, str(version))), "")
