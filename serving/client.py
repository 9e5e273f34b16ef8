"""Clients of `resnet.v1.Classifier`, for threads and for asyncio.

    with Client("127.0.0.1:8001") as client:
        answer = client.classify([Path("cat.jpg").read_bytes()])
        print(answer.images[0][0].label)

Both raise the errors of `serving.errors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import grpc
import numpy as np
from numpy.typing import NDArray

from protos import classifier_pb2 as pb
from protos.classifier_pb2_grpc import ClassifierStub
from serving.errors import from_rpc

Images = Sequence[bytes] | NDArray[np.uint8]
"""Files, each JPEG or PNG; or pixels, uint8 [n, height, width, 3], of the size that the model takes."""

DEFAULT_SERVER = "127.0.0.1:8001"
UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


@dataclass(frozen=True)
class Class:
    """One class of an image: its name, its place among the model's outputs, its probability."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Answer:
    """What the server said of a request's images.

    Attributes:
        model: Name of the model that answered.
        version: Its version.
        images: For each image its classes, the most probable first.
        decode_ns: Time the server took to unpack the request, in nanoseconds.
        queue_ns: Time the images waited for the engine, in nanoseconds.
        compute_ns: Time to compute their batch, in nanoseconds.
        batch_size: Images in that batch, those of other requests included.
    """

    model: str
    version: int
    images: tuple[tuple[Class, ...], ...]
    decode_ns: int
    queue_ns: int
    compute_ns: int
    batch_size: int


@dataclass(frozen=True)
class Tls:
    """What a client knows of certificates, in PEM.

    Attributes:
        authority: Certificate of the authority that the server's is of; None trusts those that gRPC knows.
        certificate: The client's own, where the server asks for one.
        key: Its private key.
    """

    authority: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None

    def to_credentials(self) -> grpc.ChannelCredentials:
        """Return this as gRPC takes it."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


class Client:
    """A connection to a server, for use from any number of threads."""

    def __init__(self, server: str = DEFAULT_SERVER, *, tls: Tls | None = None, token: str | None = None) -> None:
        """Prepare a connection; it is made with the first call.

        Args:
            server: HOST:PORT.
            tls: How to encrypt; None is open text.
            token: What the server asks callers for.
        """
        self._channel = (
            grpc.secure_channel(server, tls.to_credentials(), UNLIMITED)
            if tls
            else grpc.insecure_channel(server, UNLIMITED)
        )
        self._stub, self._metadata = ClassifierStub(self._channel), _authorize(token)

    def classify(
        self, images: Images, *, top_k: int = 0, model: str = "", version: int = 0, timeout: float | None = 30
    ) -> Answer:
        """Classify images.

        Args:
            images: Files or pixels.
            top_k: Classes to return for each; 0 asks for 5, or all where there are fewer.
            model: Name of the model; may be empty where the server has just one.
            version: 0 asks for the latest.
            timeout: Seconds until the call gives up; None waits for ever.

        Raises:
            ServingError: One of those in `serving.errors`.
        """
        try:
            request = _request(images, top_k, model, version)
            return _answer(self._stub.Classify(request, timeout=timeout, metadata=self._metadata))
        except grpc.RpcError as error:
            raise from_rpc(error) from None

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """A connection to a server, for use within one event loop."""

    def __init__(self, server: str = DEFAULT_SERVER, *, tls: Tls | None = None, token: str | None = None) -> None:
        """Prepare a connection; arguments are those of `Client`."""
        self._channel = (
            grpc.aio.secure_channel(server, tls.to_credentials(), UNLIMITED)
            if tls
            else grpc.aio.insecure_channel(server, UNLIMITED)
        )
        self._stub, self._metadata = ClassifierStub(self._channel), _authorize(token)

    async def classify(
        self, images: Images, *, top_k: int = 0, model: str = "", version: int = 0, timeout: float | None = 30
    ) -> Answer:
        """Classify images; arguments, result and errors are those of `Client.classify`."""
        try:
            request = _request(images, top_k, model, version)
            return _answer(await self._stub.Classify(request, timeout=timeout, metadata=self._metadata))
        except grpc.RpcError as error:
            raise from_rpc(error) from None

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _authorize(token: str | None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()


def _request(images: Images, top_k: int, model: str, version: int) -> pb.ClassifyRequest:
    request = pb.ClassifyRequest(model=model, version=version, top_k=top_k)
    if not isinstance(images, np.ndarray):
        request.encoded.images.extend(images)
        return request
    if images.dtype != np.uint8:
        raise TypeError(f"pixels must be uint8, from 0 to 255, not {images.dtype}")
    request.tensor.data_type = pb.DATA_TYPE_UINT8
    request.tensor.shape.extend(images.shape)
    request.tensor.data = images.tobytes()
    return request


def _answer(response: pb.ClassifyResponse) -> Answer:
    return Answer(
        model=response.model,
        version=response.version,
        images=tuple(
            tuple(Class(item.label, item.index, item.probability) for item in image.classes)
            for image in response.classifications
        ),
        decode_ns=response.timing.decode_ns,
        queue_ns=response.timing.queue_ns,
        compute_ns=response.timing.compute_ns,
        batch_size=response.timing.batch_size,
    )
