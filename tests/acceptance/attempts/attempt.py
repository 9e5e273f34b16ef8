"""What every attempt is made of: the server as a client sees it, and the outcome that is expected."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import grpc
import numpy as np

from protos import classifier_pb2 as pb
from serving import client
from serving.client import Client
from serving.client.channel import UNLIMITED
from serving.config import Limits
from serving.protocols.classifier import SERVICE

TOKEN, ADMIN_TOKEN = "sesame", "open-wide"
CLASSIFY = f"/{SERVICE}/Classify"
INFER, STREAM = "/inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelStreamInfer"
PREDICT = "/tensorflow.serving.PredictionService/Predict"
LIMITS = Limits()
MEGABYTE = 2**20


class AttemptOutcome(NamedTuple):
    """The outcome of an attempt: the gRPC status or the HTTP/2 frame, and the message with it."""

    code: str
    message: str = ""


class LimitAttempt(NamedTuple):
    """Something that the server must refuse.

    Attributes:
        name: What is attempted.
        run: Attempts it on a server.
        code: Regular expression that the code of the outcome must match as a whole.
        message: Regular expression that the message of the outcome must match.
        megabytes: Allowed growth of the server's memory during the attempt.
    """

    name: str
    run: Callable[[LimitTarget], AttemptOutcome]
    code: str
    message: str = ""
    megabytes: int = 200


class LimitTarget:
    """A server, as a client sees it that has only its address."""

    def __init__(self, address: str, shape: tuple[int, int, int], tls: client.Tls | None = None) -> None:
        """Take a server.

        Args:
            address: HOST:PORT.
            shape: Shape of an image, (height, width, 3).
            tls: Certificates of a client that is allowed in; None is without encryption.
        """
        self.address, self.shape, self._tls = address, shape, tls

    def check_service(self) -> None:
        """Send a valid request.

        Raises:
            ServingError: The request was not answered.
        """
        with Client(self.address, tls=self._tls, token=TOKEN) as connection:
            connection.classify(np.zeros((1, *self.shape), np.uint8))

    def call(
        self,
        path: str,
        *messages: bytes,
        token: str | None = TOKEN,
        metadata: Iterable[tuple[str, str]] = (),
        compressed: bool = False,
        timeout: float = 120,
    ) -> AttemptOutcome:
        """Send messages to a method over a connection of their own, and return the status of the call."""
        options = [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)]
        authorization = [("authorization", f"Bearer {token}")] if token else []
        with self.channel(options) as channel:
            method: Any = channel.stream_stream(path)  # of bytes, which the types have no name for
            call = method(
                iter(messages),
                timeout=timeout,
                metadata=(*authorization, *metadata),
                compression=grpc.Compression.Gzip if compressed else None,
            )
            try:
                for _ in call:
                    pass
            except grpc.RpcError:
                pass
            return AttemptOutcome(call.code().name, call.details())

    def channel(self, options: list[tuple[str, str | int]]) -> grpc.Channel:
        """Open a channel to the server."""
        if self._tls:
            return grpc.secure_channel(self.address, self._tls.to_credentials(), options)
        return grpc.insecure_channel(self.address, options)


def call(path: str, *messages: bytes, **options: Any) -> Callable[[LimitTarget], AttemptOutcome]:
    """Return an attempt that makes one call; the arguments are those of `LimitTarget.call`."""
    return lambda target: target.call(path, *messages, **options)


def encode(files: list[bytes]) -> bytes:
    """Return a serialized request to classify image files."""
    return pb.ClassifyRequest(encoded=pb.EncodedImages(images=files)).SerializeToString()
