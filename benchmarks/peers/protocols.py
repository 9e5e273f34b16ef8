"""How the servers are asked: each with the same float32 pixels, packed as it takes them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from urllib.request import Request, urlopen

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks.load import h2load
from benchmarks.load.samples import Sample
from protos import inference_pb2 as pb
from serving.client.channel import UNLIMITED

FloatPixels = NDArray[np.float32]
Probabilities = NDArray[np.float32]

SECONDS = 10  # for one answer


class PeerProtocol(Protocol):
    """Carries the images of one request to a server."""

    def pack(self, model: str, pixels: FloatPixels) -> bytes:
        """Return the request for float32 [n, height, width, 3], 0 to 255."""
        ...

    def ask(self, address: str, request: bytes) -> Probabilities:
        """Return what a server answers, float32 of any shape; OSError or grpc.RpcError if it does not."""
        ...

    def load(self, address: str, request: bytes, in_flight: int, images: int, seconds: float) -> Sample:
        """Put a server under load with so many requests of so many images at a time."""
        ...


class KServePeer:
    """`ModelInfer` of the KServe v2 protocol, over gRPC."""

    path = "/inference.GRPCInferenceService/ModelInfer"

    def pack(self, model: str, pixels: FloatPixels) -> bytes:
        """Return the request."""
        tensor = pb.ModelInferRequest.InferInputTensor(name="image", datatype="FP32", shape=pixels.shape)
        request = pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=[pixels.tobytes()])
        return request.SerializeToString()

    def ask(self, address: str, request: bytes) -> Probabilities:
        """Return what a server answers."""
        with grpc.insecure_channel(address, UNLIMITED) as channel:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(self.path)
            answer = pb.ModelInferResponse.FromString(call(request, timeout=SECONDS))
        return np.frombuffer(b"".join(answer.raw_output_contents), np.float32)

    def load(self, address: str, request: bytes, in_flight: int, images: int, seconds: float) -> Sample:
        """Put a server under load."""
        return h2load.measure(address, self.path, request, in_flight, images, seconds)


@dataclass(frozen=True)
class HttpPeer:
    """POST requests over HTTP/1.1, with a body of the server's own form.

    Attributes:
        path: Where to send them.
        content_type: Of the body.
        to_body: Makes it of pixels.
        from_body: Makes probabilities of that of an answer.
    """

    path: str
    content_type: str
    to_body: Callable[[FloatPixels], bytes]
    from_body: Callable[[bytes], Probabilities]

    def pack(self, model: str, pixels: FloatPixels) -> bytes:  # noqa: ARG002
        """Return the request."""
        return self.to_body(pixels)

    def ask(self, address: str, request: bytes) -> Probabilities:
        """Return what a server answers."""
        question = Request(f"http://{address}{self.path}", request, {"content-type": self.content_type})
        with urlopen(question, timeout=SECONDS) as answer:
            return self.from_body(answer.read())

    def load(self, address: str, request: bytes, in_flight: int, images: int, seconds: float) -> Sample:
        """Put a server under load."""
        headers = {"content-type": self.content_type}
        return h2load.measure_http(f"http://{address}{self.path}", request, in_flight, images, seconds, headers)


RAW = HttpPeer(
    "/inference",
    "application/octet-stream",
    to_body=lambda pixels: pixels.tobytes(),
    from_body=lambda body: np.frombuffer(body, np.float32),
)
JSON = HttpPeer(
    "/predict",
    "application/json",
    to_body=lambda pixels: json.dumps({"image": _to_text(pixels)}).encode(),
    from_body=lambda body: np.asarray(json.loads(body)["probabilities"], np.float32),
)
JSON_BATCH = HttpPeer(  # a batch of one request, which the server adds to others
    "/classify",
    "application/json",
    to_body=lambda pixels: json.dumps({"images": [_to_text(pixels)]}).encode(),
    from_body=lambda body: np.asarray(json.loads(body), np.float32),
)


def _to_text(pixels: FloatPixels) -> str:
    return base64.b64encode(pixels.tobytes()).decode()
