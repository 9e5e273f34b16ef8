"""The protocols of the peers: each packs the same float32 pixels in the form that the server takes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from urllib.request import Request, urlopen

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.load import h2load
from benchmarks.load.samples import Sample
from benchmarks.load.targets import Workload
from protos import inference_pb2 as pb
from serving.client.channel import UNLIMITED
from serving.protocols.kserve import pack_elements
from serving.runtimes.base import Probabilities

FloatPixels = NDArray[np.float32]

TIMEOUT_SECONDS = 10  # of one request
HEAD_SIZE = "inference-header-content-length"
BOUNDARY = b"boundary"


class PeerProtocol(Protocol):
    """Sends requests of images to a server."""

    def pack(self, model: str, pixels: FloatPixels) -> bytes:
        """Serialize a request for pixels, float32 [n, height, width, 3], 0 to 255."""
        ...

    def call(self, address: str, request: bytes) -> Probabilities:
        """Send one request, and return the probabilities, float32 of any shape.

        Raises:
            OSError: The server does not answer, over HTTP.
            grpc.RpcError: The server does not answer, over gRPC.
        """
        ...

    def load(self, address: str, request: bytes, workload: Workload, seconds: float) -> Sample:
        """Put a server under a workload, by h2load."""
        ...


class KServePeer:
    """`ModelInfer` of the KServe v2 protocol, over gRPC."""

    path = "/inference.GRPCInferenceService/ModelInfer"

    def pack(self, model: str, pixels: FloatPixels) -> bytes:
        """Serialize a request."""
        tensor = pb.ModelInferRequest.InferInputTensor(name="image", datatype="FP32", shape=pixels.shape)
        request = pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=[pixels.tobytes()])
        return request.SerializeToString()

    def call(self, address: str, request: bytes) -> Probabilities:
        """Send one request, and return the probabilities."""
        with grpc.insecure_channel(address, UNLIMITED) as channel:
            method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(self.path)
            response = pb.ModelInferResponse.FromString(method(request, timeout=TIMEOUT_SECONDS))
        return np.frombuffer(b"".join(response.raw_output_contents), np.float32)

    def load(self, address: str, request: bytes, workload: Workload, seconds: float) -> Sample:
        """Put a server under a workload."""
        return h2load.measure(address, self.path, request, workload.in_flight, workload.images, seconds)


class KServeHttpPeer:
    """`infer` of the KServe v2 protocol over HTTP, with binary tensors."""

    def pack(self, model: str, pixels: FloatPixels) -> bytes:
        """Serialize a request: its JSON, a line end, and the pixels. JSON may end with spaces."""
        size = {"binary_data_size": pixels.nbytes}
        tensor = {"name": "image", "datatype": "FP32", "shape": pixels.shape, "parameters": size}
        head = {"id": model, "inputs": [tensor], "parameters": {"binary_data_output": True}}
        return json.dumps(head).encode() + b"\n" + pixels.tobytes()

    def call(self, address: str, request: bytes) -> Probabilities:
        """Send one request, and return the probabilities."""
        url, headers = self._address(address, request)
        with urlopen(Request(url, request, headers), timeout=TIMEOUT_SECONDS) as response:
            return np.frombuffer(response.read()[int(response.headers[HEAD_SIZE]) :], np.float32)

    def load(self, address: str, request: bytes, workload: Workload, seconds: float) -> Sample:
        """Put a server under a workload."""
        url, headers = self._address(address, request)
        return h2load.measure_http(url, request, workload.in_flight, workload.images, seconds, headers)

    def _address(self, address: str, request: bytes) -> tuple[str, dict[str, str]]:
        """Return the URL and the headers of a request."""
        head, _, _ = request.partition(b"\n")
        url = f"http://{address}/v2/models/{json.loads(head)['id']}/infer"
        return url, {"content-type": "application/octet-stream", HEAD_SIZE: str(len(head) + 1)}


class FilesPeer:
    """Image files as the body of a request to `resnet serve`: a PNG, or several as multipart."""

    path = "/classify?top_k=1000000"

    def pack(self, model: str, pixels: FloatPixels) -> bytes:  # noqa: ARG002
        """Serialize a request."""
        files = [_to_png(image) for image in pixels.astype(np.uint8)]
        if len(files) == 1:
            return files[0]
        part = b'--%s\r\nContent-Disposition: form-data; name="image"; filename="image.png"\r\n\r\n%s\r\n'
        return b"".join(part % (BOUNDARY, file) for file in files) + b"--%s--\r\n" % BOUNDARY

    def call(self, address: str, request: bytes) -> Probabilities:
        """Send one request, and return the probabilities."""
        post = Request(f"http://{address}{self.path}", request, self._headers(request))
        with urlopen(post, timeout=TIMEOUT_SECONDS) as response:
            answers = json.loads(response.read())["classifications"]
        rows = [sorted((one["index"], one["probability"]) for one in answer["classes"]) for answer in answers]
        return np.array([[probability for _, probability in row] for row in rows], np.float32)

    def load(self, address: str, request: bytes, workload: Workload, seconds: float) -> Sample:
        """Put a server under a workload."""
        url, headers = f"http://{address}{self.path}", self._headers(request)
        return h2load.measure_http(url, request, workload.in_flight, workload.images, seconds, headers)

    def _headers(self, request: bytes) -> dict[str, str]:
        several = request.startswith(b"--")
        return {"content-type": f"multipart/form-data; boundary={BOUNDARY.decode()}" if several else "image/png"}


@dataclass(frozen=True)
class HttpPeer:
    """POST requests over HTTP/1.1, with a body in the server's own format.

    Attributes:
        path: Path of the URL.
        content_type: Content type of a request.
        to_body: Serializes pixels as the body of a request.
        from_body: Parses probabilities from the body of a response.
    """

    path: str
    content_type: str
    to_body: Callable[[FloatPixels], bytes]
    from_body: Callable[[bytes], Probabilities]

    def pack(self, model: str, pixels: FloatPixels) -> bytes:  # noqa: ARG002
        """Serialize a request."""
        return self.to_body(pixels)

    def call(self, address: str, request: bytes) -> Probabilities:
        """Send one request, and return the probabilities."""
        post = Request(f"http://{address}{self.path}", request, {"content-type": self.content_type})
        with urlopen(post, timeout=TIMEOUT_SECONDS) as response:
            return self.from_body(response.read())

    def load(self, address: str, request: bytes, workload: Workload, seconds: float) -> Sample:
        """Put a server under a workload."""
        url, headers = f"http://{address}{self.path}", {"content-type": self.content_type}
        return h2load.measure_http(url, request, workload.in_flight, workload.images, seconds, headers)


RAW = HttpPeer(
    "/inference",
    "application/octet-stream",
    to_body=lambda pixels: pixels.tobytes(),
    from_body=lambda body: np.frombuffer(body, np.float32),
)
FILES = HttpPeer(
    "/inference",
    "application/octet-stream",
    to_body=lambda pixels: pack_elements(map(_to_png, pixels.astype(np.uint8))),
    from_body=lambda body: np.frombuffer(body, np.float32),
)
JSON = HttpPeer(
    "/predict",
    "application/json",
    to_body=lambda pixels: json.dumps({"image": _to_base64(pixels)}).encode(),
    from_body=lambda body: np.asarray(json.loads(body)["probabilities"], np.float32),
)
JSON_BATCH = HttpPeer(  # a batch of one request, which the server merges with others
    "/classify",
    "application/json",
    to_body=lambda pixels: json.dumps({"images": [_to_base64(pixels)]}).encode(),
    from_body=lambda body: np.asarray(json.loads(body), np.float32),
)


def _to_png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _to_base64(pixels: FloatPixels) -> str:
    return base64.b64encode(pixels.tobytes()).decode()
