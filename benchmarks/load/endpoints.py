"""Endpoints: which input a model takes, as its server reports it, and serialized requests for it, in each protocol."""

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
from resnet.files import read_file
from serving.client.access import ANYONE, CallerAccess
from serving.client.channel import UNLIMITED, CallMetadata
from training.images import CHANNELS, InvalidImage, decode

SIGNATURE, SIGNATURE_DEF = "serving_default", "signature_def"
PATIENCE_SECONDS = 30
DISTINCT_BYTES = 64 * 2**20  # limit of all serialized requests together
DISTINCT = 16  # requests with different images
TYPES = {"UINT8": "u1", "FP32": "<f4"}

PixelArray = NDArray[Any]
"""Pixels of one of `TYPES`: [images, ...]."""


class Input(NamedTuple):
    """The input of a model.

    Attributes:
        model: Name of the model.
        name: Name of the input.
        shape: Shape of a request, [images, ...]; -1 stands for any size.
        datatype: UINT8 or FP32, with pixels of 0 to 255.
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
        path: Path of the method.
        requests: Serialized requests, to be sent in turn.
        images: Images per request.
        input: Input of the model.
        protocol: One of `PROTOCOLS`.
        access: What the server asks of its callers.
    """

    address: str
    path: str
    requests: tuple[bytes, ...]
    images: int
    input: Input
    protocol: str
    access: CallerAccess = ANYONE


class InferenceProtocol(NamedTuple):
    """A protocol of model servers.

    Attributes:
        path: Path of the method that classifies.
        describe: Asks a server for the input of a model.
        pack: Serializes a request of pixels.
    """

    path: str
    describe: Callable[[grpc.Channel, str, CallMetadata], Input]
    pack: Callable[[Input, PixelArray], bytes]


def connect(
    address: str,
    protocol: str = "native",
    model: str = "",
    images: int = 1,
    shape: Sequence[int] = (),
    data: Sequence[Path] = (),
    datatype: str = "",
    access: CallerAccess = ANYONE,
) -> Endpoint:
    """Ask a server which input its model takes, and make requests for it.

    Args:
        address: HOST:PORT.
        protocol: One of `PROTOCOLS`.
        model: Name of the model; may be empty if the server lists its models and has only one.
        images: Images per request.
        shape: Shape of one image, if the server leaves it open.
        data: JPEG or PNG files to send; none sends noise.
        datatype: One of `TYPES`, if the server takes others than it reports.
        access: What the server asks of its callers.

    Raises:
        BadInput: The server does not answer, or the model does not take such images.
    """
    spec = describe(address, protocol, model, images, shape, datatype, access)
    size = int(np.prod(spec.shape)) * np.dtype(TYPES[spec.datatype]).itemsize
    count = max(1, min(DISTINCT, DISTINCT_BYTES // size))
    pixels = make_pixels(spec, count * images, data)
    path, _, pack = PROTOCOLS[protocol]
    requests = tuple(pack(spec, part) for part in np.split(pixels, count))
    return Endpoint(address, path, requests, images, spec, protocol, access)


def describe(
    address: str,
    protocol: str,
    model: str = "",
    images: int = 1,
    shape: Sequence[int] = (),
    datatype: str = "",
    access: CallerAccess = ANYONE,
) -> Input:
    """Return the input of a model with the shape of a request, as the server reports it; see `connect`."""
    with access.open_channel(address, UNLIMITED) as channel:
        try:
            reported = PROTOCOLS[protocol].describe(channel, model, access.metadata)
        except grpc.RpcError as error:
            raise BadInput(
                f"{address} does not report the input of its model: {error.details()} ({error.code().name})"
            ) from None
    spec = _complete(reported._replace(datatype=datatype or reported.datatype), images, tuple(shape))
    if protocol == "native" and spec.datatype != "UINT8":
        raise BadInput(f"the native protocol takes UINT8 pixels, not {spec.datatype}; choose another --protocol")
    return spec


def make_pixels(spec: Input, count: int, data: Sequence[Path] = ()) -> PixelArray:
    """Return `count` images in the model's shape and datatype: noise, or the images of files in turn.

    Raises:
        BadInput: A file is no image, or the model's input is not [height, width, channels].
    """
    pixels = _read_files(spec, data)[np.arange(count) % len(data)] if data else _make_noise(spec, count)
    return pixels.astype(TYPES[spec.datatype], copy=False)


def _complete(reported: Input, images: int, shape: tuple[int, ...]) -> Input:
    """Return the input with the shape of a request."""
    if reported.datatype not in TYPES:
        raise BadInput(f"model {reported.model!r} takes {reported.datatype}; only UINT8 and FP32 pixels can be sent")
    batch, *sizes = reported.shape or (-1,)
    if batch not in (-1, images):
        raise BadInput(f"model {reported.model!r} takes requests of {batch} images; give --images {batch}")
    image_shape = shape or tuple(sizes)
    if not image_shape or min(image_shape) < 1:
        raise BadInput(
            f"model {reported.model!r} leaves the shape of an image open, {sizes}; give --shape, as 224,224,3"
        )
    return reported._replace(shape=(images, *image_shape))


def _make_noise(spec: Input, count: int) -> PixelArray:
    return np.random.default_rng(0).integers(0, 256, (count, *spec.shape[1:]), np.uint8)


def _read_files(spec: Input, files: Sequence[Path]) -> PixelArray:
    """Return the pixels of image files, resized to the model's input."""
    _, *sizes = spec.shape
    if len(sizes) != 3 or sizes[2] not in CHANNELS.values():
        raise BadInput(f"--data needs a model of [height, width, 1, 3 or 4]; {spec.model!r} takes {sizes}")
    pixels = []
    for file in files:
        try:
            pixels.append(decode(read_file(file), (sizes[0], sizes[1]), channels=sizes[2]))
        except InvalidImage as error:
            raise BadInput(f"{file} {error}") from None
    return np.stack(pixels)


def describe_kserve(channel: grpc.Channel, model: str, metadata: CallMetadata = ()) -> Input:
    """Return the input by KServe's ModelMetadata; without a name, Triton's RepositoryIndex finds the only model."""
    stub = GRPCInferenceServiceStub(channel)
    if not model:
        request = inference_pb2.RepositoryIndexRequest(ready=True)
        index = stub.RepositoryIndex(request, timeout=PATIENCE_SECONDS, metadata=metadata)
        names = sorted({entry.name for entry in index.models})
        if len(names) != 1:
            raise BadInput(f"the server has the models {', '.join(names) or 'none'}; choose one with --model")
        (model,) = names
    asked = inference_pb2.ModelMetadataRequest(name=model)
    described = stub.ModelMetadata(asked, timeout=PATIENCE_SECONDS, metadata=metadata)
    if len(described.inputs) != 1:
        raise BadInput(f"model {model!r} takes {len(described.inputs)} inputs; a classifier of images takes one")
    tensor = described.inputs[0]
    return Input(model, tensor.name, tuple(tensor.shape), tensor.datatype)


def describe_tfs(channel: grpc.Channel, model: str, metadata: CallMetadata = ()) -> Input:
    """Return the input by TensorFlow Serving's GetModelMetadata."""
    if not model:
        raise BadInput("TensorFlow Serving lists no models; name one with --model")
    pb, tf = tensorflow_serving_pb2, tensorflow_pb2
    spec = pb.ModelSpec(name=model)
    request = pb.GetModelMetadataRequest(model_spec=spec, metadata_field=[SIGNATURE_DEF])
    response = PredictionServiceStub(channel).GetModelMetadata(request, timeout=PATIENCE_SECONDS, metadata=metadata)
    signatures = pb.SignatureDefMap()
    response.metadata[SIGNATURE_DEF].Unpack(signatures)
    inputs = signatures.signature_def[SIGNATURE].inputs
    if len(inputs) != 1:
        raise BadInput(
            f"the signature {SIGNATURE!r} of {model!r} has {len(inputs)} inputs; an image classifier has one"
        )
    ((name, tensor),) = inputs.items()
    datatype = {tf.DT_UINT8: "UINT8", tf.DT_FLOAT: "FP32"}.get(tensor.dtype, tf.DataType.Name(tensor.dtype))
    return Input(model, name, tuple(axis.size for axis in tensor.tensor_shape.dim), datatype)


def pack_native(spec: Input, pixels: PixelArray) -> bytes:
    """Serialize a request for the most probable class of each image."""
    pb = classifier_pb2
    tensor = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=pixels.shape, data=pixels.tobytes())
    return pb.ClassifyRequest(model=spec.model, tensor=tensor, top_k=1).SerializeToString()


def pack_kserve(spec: Input, pixels: PixelArray) -> bytes:
    """Serialize a request for all outputs of the model."""
    pb = inference_pb2
    tensor = pb.ModelInferRequest.InferInputTensor(name=spec.name, datatype=spec.datatype, shape=pixels.shape)
    request = pb.ModelInferRequest(model_name=spec.model, inputs=[tensor], raw_input_contents=[pixels.tobytes()])
    return request.SerializeToString()


def pack_tfs(spec: Input, pixels: PixelArray) -> bytes:
    """Serialize a request for all outputs of the signature."""
    pb, tf = tensorflow_serving_pb2, tensorflow_pb2
    tensor = tf.TensorProto(
        dtype={"UINT8": tf.DT_UINT8, "FP32": tf.DT_FLOAT}[spec.datatype],
        tensor_shape=tf.TensorShapeProto(dim=[tf.TensorShapeProto.Dim(size=size) for size in pixels.shape]),
        tensor_content=pixels.tobytes(),
    )
    model_spec = pb.ModelSpec(name=spec.model, signature_name=SIGNATURE)
    return pb.PredictRequest(model_spec=model_spec, inputs={spec.name: tensor}).SerializeToString()


PROTOCOLS = {
    "native": InferenceProtocol("/resnet.v1.Classifier/Classify", describe_kserve, pack_native),
    "kserve": InferenceProtocol("/inference.GRPCInferenceService/ModelInfer", describe_kserve, pack_kserve),
    "tfs": InferenceProtocol("/tensorflow.serving.PredictionService/Predict", describe_tfs, pack_tfs),
}
