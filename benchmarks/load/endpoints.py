"""What a server says that its model takes, and requests made of it: for each protocol, without asking the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
from numpy.typing import NDArray

from protos import classifier_pb2, inference_pb2, tensorflow_pb2, tensorflow_serving_pb2
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from protos.tensorflow_serving_pb2_grpc import PredictionServiceStub
from resnet import BadInput
from serving.client.channel import UNLIMITED
from training.images import InvalidImage, decode

SIGNATURE, SIGNATURE_DEF = "serving_default", "signature_def"
PATIENCE_SECONDS = 30
DISTINCT_BYTES = 64 * 2**20  # of all requests that are made ahead
DISTINCT = 16
TYPES = {"UINT8": "u1", "FP32": "<f4"}

PixelArray = NDArray[Any]
"""Of one of `TYPES`: [images, ...]."""


class Input(NamedTuple):
    """What a model takes.

    Attributes:
        model: Its name.
        name: Of the input.
        shape: Of all images of a request; -1 leaves a number open, as that of the images.
        datatype: UINT8 or FP32, pixels of 0 to 255.
    """

    model: str
    name: str
    shape: tuple[int, ...]
    datatype: str


@dataclass(frozen=True)
class Endpoint:
    """A method of a server, with requests for it.

    Attributes:
        address: HOST:PORT.
        path: Of the method.
        requests: Serialized, to be sent in turn.
        images: In each.
        input: What the model takes.
        protocol: One of `PROTOCOLS`.
    """

    address: str
    path: str
    requests: tuple[bytes, ...]
    images: int
    input: Input
    protocol: str


class Protocol(NamedTuple):
    """How a server is asked: for what its model takes, and to classify pixels of that datatype."""

    path: str
    describe: Callable[[grpc.Channel, str], Input]
    pack: Callable[[Input, PixelArray], bytes]


def connect(
    address: str,
    protocol: str = "native",
    model: str = "",
    images: int = 1,
    shape: Sequence[int] = (),
    data: Sequence[Path] = (),
    datatype: str = "",
) -> Endpoint:
    """Ask a server what its model takes, and make requests of that.

    Args:
        address: HOST:PORT, without encryption.
        protocol: One of `PROTOCOLS`.
        model: Its name; may be empty where the server has just one, and lists it.
        images: In each request.
        shape: Of one image, where the server leaves it open.
        data: JPEG or PNG files to send; none sends noise.
        datatype: One of `TYPES`, where the server takes others than the one that it tells.

    Raises:
        BadInput: The server does not answer, or the model is none that takes images like that.
    """
    wanted = describe(address, protocol, model, images, shape, datatype)
    size = int(np.prod(wanted.shape)) * np.dtype(TYPES[wanted.datatype]).itemsize
    count = max(1, min(DISTINCT, DISTINCT_BYTES // size))
    pixels = make_pixels(wanted, count * images, data)
    spoken = PROTOCOLS[protocol]
    requests = tuple(spoken.pack(wanted, part) for part in np.split(pixels, count))
    return Endpoint(address, spoken.path, requests, images, wanted, protocol)


def describe(
    address: str, protocol: str, model: str = "", images: int = 1, shape: Sequence[int] = (), datatype: str = ""
) -> Input:
    """Ask a server what its model takes; see `connect`."""
    with grpc.insecure_channel(address, UNLIMITED) as channel:
        try:
            found = PROTOCOLS[protocol].describe(channel, model)
        except grpc.RpcError as error:
            raise BadInput(
                f"{address} does not say what its model takes: {error.details()} ({error.code().name})"
            ) from None
    wanted = _settle(found._replace(datatype=datatype or found.datatype), images, tuple(shape))
    if protocol == "native" and wanted.datatype != "UINT8":
        raise BadInput(f"the native protocol takes UINT8 pixels, not {wanted.datatype}; choose another --protocol")
    return wanted


def make_pixels(wanted: Input, count: int, data: Sequence[Path] = ()) -> PixelArray:
    """Return so many images as the model takes them: noise, or those of files in turn.

    Raises:
        BadInput: A file is no image, or the model takes no images as files have them.
    """
    pixels = _read(wanted, data)[np.arange(count) % len(data)] if data else _draw(wanted, count)
    return pixels.astype(TYPES[wanted.datatype], copy=False)


def _settle(found: Input, images: int, shape: tuple[int, ...]) -> Input:
    """Return the input with the shape of a request."""
    if found.datatype not in TYPES:
        raise BadInput(f"model {found.model!r} takes {found.datatype}; only UINT8 and FP32 pixels can be sent")
    batch, *sizes = found.shape or (-1,)
    if batch not in (-1, images):
        raise BadInput(f"model {found.model!r} takes requests of {batch} images; give --images {batch}")
    wanted = shape or tuple(sizes)
    if not wanted or min(wanted) < 1:
        raise BadInput(f"model {found.model!r} leaves the shape of an image open, {sizes}; give --shape, as 224,224,3")
    return found._replace(shape=(images, *wanted))


def _draw(wanted: Input, count: int) -> PixelArray:
    return np.random.default_rng(0).integers(0, 256, (count, *wanted.shape[1:]), np.uint8)


def _read(wanted: Input, files: Sequence[Path]) -> PixelArray:
    """Return the pixels of files, resized to what the model takes."""
    _, *sizes = wanted.shape
    if len(sizes) != 3 or sizes[2] != 3:
        raise BadInput(f"--data needs a model of [height, width, 3]; {wanted.model!r} takes {sizes}")
    pixels = []
    for file in files:
        try:
            pixels.append(decode(file.read_bytes(), (sizes[0], sizes[1])))
        except InvalidImage as error:
            raise BadInput(f"{file} {error}") from None
    return np.stack(pixels)


def describe_kserve(channel: grpc.Channel, model: str) -> Input:
    """Ask by KServe's ModelMetadata; without a name, Triton's RepositoryIndex finds the only model."""
    stub = GRPCInferenceServiceStub(channel)
    if not model:
        index = stub.RepositoryIndex(inference_pb2.RepositoryIndexRequest(ready=True), timeout=PATIENCE_SECONDS)
        names = sorted({entry.name for entry in index.models})
        if len(names) != 1:
            raise BadInput(f"the server has the models {', '.join(names) or 'none'}; choose one with --model")
        (model,) = names
    found = stub.ModelMetadata(inference_pb2.ModelMetadataRequest(name=model), timeout=PATIENCE_SECONDS)
    if len(found.inputs) != 1:
        raise BadInput(f"model {model!r} takes {len(found.inputs)} inputs; a classifier of images takes one")
    taken = found.inputs[0]
    return Input(model, taken.name, tuple(taken.shape), taken.datatype)


def describe_tfs(channel: grpc.Channel, model: str) -> Input:
    """Ask by TensorFlow Serving's GetModelMetadata."""
    if not model:
        raise BadInput("TensorFlow Serving lists no models; name one with --model")
    pb, tf = tensorflow_serving_pb2, tensorflow_pb2
    spec = pb.ModelSpec(name=model)
    request = pb.GetModelMetadataRequest(model_spec=spec, metadata_field=[SIGNATURE_DEF])
    answer = PredictionServiceStub(channel).GetModelMetadata(request, timeout=PATIENCE_SECONDS)
    signatures = pb.SignatureDefMap()
    answer.metadata[SIGNATURE_DEF].Unpack(signatures)
    inputs = signatures.signature_def[SIGNATURE].inputs
    if len(inputs) != 1:
        raise BadInput(
            f"the signature {SIGNATURE!r} of {model!r} has {len(inputs)} inputs; an image classifier has one"
        )
    ((name, taken),) = inputs.items()
    datatype = {tf.DT_UINT8: "UINT8", tf.DT_FLOAT: "FP32"}.get(taken.dtype, tf.DataType.Name(taken.dtype))
    return Input(model, name, tuple(axis.size for axis in taken.tensor_shape.dim), datatype)


def pack_native(wanted: Input, pixels: PixelArray) -> bytes:
    """Return a request for one class of each image."""
    pb = classifier_pb2
    tensor = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=pixels.shape, data=pixels.tobytes())
    return pb.ClassifyRequest(model=wanted.model, tensor=tensor, top_k=1).SerializeToString()


def pack_kserve(wanted: Input, pixels: PixelArray) -> bytes:
    """Return a request for all that the model gives."""
    pb = inference_pb2
    tensor = pb.ModelInferRequest.InferInputTensor(name=wanted.name, datatype=wanted.datatype, shape=pixels.shape)
    request = pb.ModelInferRequest(model_name=wanted.model, inputs=[tensor], raw_input_contents=[pixels.tobytes()])
    return request.SerializeToString()


def pack_tfs(wanted: Input, pixels: PixelArray) -> bytes:
    """Return a request for all that the signature gives."""
    pb, tf = tensorflow_serving_pb2, tensorflow_pb2
    tensor = tf.TensorProto(
        dtype={"UINT8": tf.DT_UINT8, "FP32": tf.DT_FLOAT}[wanted.datatype],
        tensor_shape=tf.TensorShapeProto(dim=[tf.TensorShapeProto.Dim(size=size) for size in pixels.shape]),
        tensor_content=pixels.tobytes(),
    )
    spec = pb.ModelSpec(name=wanted.model, signature_name=SIGNATURE)
    return pb.PredictRequest(model_spec=spec, inputs={wanted.name: tensor}).SerializeToString()


PROTOCOLS = {
    "native": Protocol("/resnet.v1.Classifier/Classify", describe_kserve, pack_native),
    "kserve": Protocol("/inference.GRPCInferenceService/ModelInfer", describe_kserve, pack_kserve),
    "tfs": Protocol("/tensorflow.serving.PredictionService/Predict", describe_tfs, pack_tfs),
}
