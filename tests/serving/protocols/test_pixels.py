"""One decoder: training, export and every protocol of the server read the same pixels from an image file."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import grpc
import keras
import numpy as np
import pytest
import tensorflow as tf
import tritonclient.grpc as triton
from numpy.typing import NDArray
from PIL import Image
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from export import source
from export.certificate import Certificate
from export.manifest import Cost, Manifest, Preprocessing, TensorSpec
from serving.client import Client
from serving.config import Batching, Limits
from serving.errors import InvalidRequest
from serving.models import loader, registry
from serving.runtimes.base import Images, Probabilities
from serving.server import Server
from training import data
from training.images import Resize, decode

SHAPE = (2, 2, 3)
CLASSES = 12
WHITE, BLACK = [255, 255, 255], [0, 0, 0]


class EchoEngine:
    """Answers with the pixels, as shares of 255."""

    provider = "test"

    def run(self, images: Images) -> Probabilities:
        """Return one output for each value."""
        return np.float32(images.reshape(len(images), -1) / 255)


def make_manifest(resize: Resize = "bilinear", shape: tuple[int, ...] = SHAPE) -> Manifest:
    """Return the manifest of a model whose classes are the values of an image."""
    classes = math.prod(shape)
    return Manifest(
        format=2,
        model="echo",
        version=1,
        created="",
        input=TensorSpec("image", "uint8", [-1, *shape]),
        output=TensorSpec("probabilities", "float32", [-1, classes]),
        labels=[str(index) for index in range(classes)],
        preprocessing=Preprocessing(resize=resize),
        opset=17,
        cost=Cost(0, 0, 0, 0, 0),
        versions={},
        cpu="",
        training=None,
        files={},
        certificate=Certificate(0, "", 0.0, 0.0, []),
    )


@pytest.fixture
def serve() -> Iterator[Callable[[Manifest], str]]:
    """Starts a server of a manifest, and returns its address."""
    servers = []

    def start(manifest: Manifest) -> str:
        model = loader.start(manifest, EchoEngine(), Batching(max_batch=4))
        servers.append(Server(registry.ModelRegistry([model]), "127.0.0.1", 0, Limits()))
        return servers[-1].address

    yield start
    for server in servers:
        server.stop(0)


def ask_native(address: str, files: list[bytes], classes: int = CLASSES) -> NDArray[np.float32]:
    """Return the outputs by our own protocol."""
    with Client(address) as client:
        answer = client.classify(files, top_k=classes)
    ordered = [sorted(classes, key=lambda item: item.index) for classes in answer.images]
    return np.float32([[item.probability for item in classes] for classes in ordered])


def ask_kserve(address: str, files: list[bytes]) -> NDArray[np.float32]:
    """Return the outputs by KServe v2."""
    tensor = triton.InferInput("image", [len(files)], "BYTES")
    tensor.set_data_from_numpy(np.array(files, dtype=np.object_))
    with triton.InferenceServerClient(address) as client:
        return cast("NDArray[np.float32]", client.infer("echo", [tensor]).as_numpy("probabilities"))


def ask_tfserving(address: str, files: list[bytes]) -> NDArray[np.float32]:
    """Return the outputs by TensorFlow Serving's protocol."""
    response = predict(address, tf.make_tensor_proto(files))
    return cast("NDArray[np.float32]", tf.make_ndarray(response.outputs["probabilities"]))


def predict(address: str, tensor: Any) -> Any:
    """Call Predict."""
    request = predict_pb2.PredictRequest(model_spec={"name": "echo"}, inputs={"image": tensor})
    with grpc.insecure_channel(address) as channel:
        return prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Return the file of an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def draw_palette() -> bytes:
    """Return an image of three colours, of which one is transparent."""
    image = Image.new("P", (2, 2))
    image.putpalette([1, 2, 3, 250, 251, 252, 0, 0, 255])
    image.putdata([0, 1, 2, 0])
    return encode(image, transparency=0)


def draw_turned() -> bytes:
    """Return an image that is to be turned to the right."""
    image = Image.fromarray(np.array([[BLACK, [10, 20, 30]], [WHITE, [40, 50, 60]]], np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    return encode(image, exif=exif)


FILES = [
    encode(Image.fromarray(np.array([[0, 8000], [32768, 65535]], np.uint16))),
    encode(Image.new("CMYK", (2, 2), (255, 0, 0, 51)), "JPEG", quality=100),
    draw_palette(),
    draw_turned(),
]
DECODED = [
    [[BLACK, [31, 31, 31]], [[128, 128, 128], WHITE]],
    [[[0, 204, 204]] * 2] * 2,
    [[[1, 2, 3], [250, 251, 252]], [[0, 0, 255], [1, 2, 3]]],
    [[WHITE, BLACK], [[40, 50, 60], [10, 20, 30]]],
]


def test_training_export_and_every_protocol_see_the_same_pixels(
    serve: Callable[[Manifest], str], tmp_path: Path
) -> None:
    """Of 16 bits, CMYK, a palette and a turned camera."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index, file in enumerate(FILES):
                (folder / f"{index}.img").write_bytes(file)
    trained = data.load(str(tmp_path / "data")).train.images
    layers = [keras.Input(SHAPE, dtype="uint8"), keras.layers.Flatten(), keras.layers.Rescaling(1 / 255)]
    keras.Sequential([*layers, keras.layers.Dense(2, "softmax")]).save(tmp_path / "mine.keras")
    exported = source.load(tmp_path / "mine.keras", str(tmp_path / "data")).evidence.images
    for images in (trained, exported):
        np.testing.assert_array_equal(images, DECODED * 2)

    address = serve(make_manifest())
    for ask in (ask_native, ask_kserve, ask_tfserving):
        np.testing.assert_array_equal(np.rint(ask(address, FILES).reshape(-1, *SHAPE) * 255), DECODED, ask.__name__)


@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 4)], ids=["grey", "rgba"])
def test_every_protocol_takes_the_channels_of_the_manifest(
    serve: Callable[[Manifest], str], shape: tuple[int, ...]
) -> None:
    """Files, whatever colours they have, and tensors."""
    address, size = serve(make_manifest(shape=shape)), math.prod(shape)
    expected = [decode(file, shape[:2], channels=shape[2]) for file in FILES]
    for ask in (partial(ask_native, classes=size), ask_kserve, ask_tfserving):
        np.testing.assert_array_equal(np.rint(ask(address, FILES).reshape(-1, *shape) * 255), expected)
    pixels = np.stack(expected)
    with Client(address) as client:
        answer = client.classify(pixels, top_k=size)
    probabilities = [[item.probability for item in classes] for classes in answer.images]
    np.testing.assert_allclose(np.sort(probabilities), np.sort(pixels.reshape(-1, size) / np.float32(255)))
    for ask in ask_with_floats(address, np.float32(pixels)):
        np.testing.assert_array_equal(np.rint(ask() * 255), pixels.ravel())
    with (
        Client(address) as client,
        pytest.raises(InvalidRequest, match=rf"takes \[images, {shape[0]}, 2, {shape[2]}\]"),
    ):
        client.classify(np.zeros((1, *shape[:2], 3), np.uint8))


@pytest.mark.parametrize(("resize", "expected"), [("bilinear", [43, 163]), ("nearest", [60, 240])])
def test_the_server_resizes_by_the_rule_of_the_manifest(
    serve: Callable[[Manifest], str], resize: Resize, expected: list[int]
) -> None:
    """It is that of the export."""
    columns = np.zeros((2, 4), np.uint8) + np.array([0, 60, 120, 240], np.uint8)
    found = ask_native(serve(make_manifest(resize)), [encode(Image.fromarray(columns))]) * 255
    assert np.rint(found.reshape(SHAPE)[0, :, 0]).tolist() == expected


def ask_with_floats(address: str, values: NDArray[np.float32]) -> Iterator[Callable[[], NDArray[np.float32]]]:
    """Yield every way to send a tensor of floats: raw and typed, by both protocols that take them."""
    raw = service_pb2.ModelInferRequest(model_name="echo", raw_input_contents=[values.tobytes()])
    typed = service_pb2.ModelInferRequest(model_name="echo")
    for request in (raw, typed):
        request.inputs.add(name="image", datatype="FP32", shape=values.shape)
    typed.inputs[0].contents.fp32_contents.extend(values.ravel())
    content = tf.make_tensor_proto(values)
    listed = tf.make_tensor_proto(values)
    listed.ClearField("tensor_content")
    listed.float_val.extend(values.ravel())

    def infer(request: Any) -> NDArray[np.float32]:
        with grpc.insecure_channel(address) as channel:
            response = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
        return np.frombuffer(response.raw_output_contents[0], np.float32)

    for request in (raw, typed):
        yield lambda request=request: infer(request)
    for tensor in (content, listed):
        yield lambda tensor=tensor: np.float32(predict(address, tensor).outputs["probabilities"].float_val)


REFUSED = "pixels must be from 0 to 255"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param(0.5, f"{REFUSED}: multiply them by 255", id="0 to 1"),
        pytest.param(1e-3, f"{REFUSED}: multiply them by 255", id="almost 0"),
        pytest.param(-1.0, REFUSED, id="-1 to 1"),
        pytest.param(-0.4, REFUSED, id="below 0"),
        pytest.param(255.4, REFUSED, id="above 255"),
        pytest.param(256.0, REFUSED, id="256"),
        pytest.param(np.nan, REFUSED, id="NaN"),
        pytest.param(np.inf, REFUSED, id="infinity"),
    ],
)
def test_floats_that_are_no_pixels_are_refused_by_every_protocol(
    serve: Callable[[Manifest], str], value: float, message: str
) -> None:
    """One such value is enough, and the sentence is the same."""
    values = np.zeros((1, *SHAPE), np.float32)
    values[0, 1, 0, 1] = value
    sentences = set()
    for ask in ask_with_floats(serve(make_manifest()), values):
        with pytest.raises(grpc.RpcError) as caught:
            ask()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        sentences.add(caught.value.details())
    assert len(sentences) == 1
    assert message in sentences.pop()


def test_floats_are_rounded_to_the_nearest_pixel_by_every_protocol(serve: Callable[[Manifest], str]) -> None:
    """Halves to the even one; whole numbers of 0 and 1 are dark pixels."""
    values = np.float32([0, 0.49, 0.5, 1.5, 2.5, 7.49, 7.51, 128, 254.5, 254.51, 255, 1]).reshape(1, *SHAPE)
    expected = [0, 0, 0, 2, 2, 7, 8, 128, 254, 255, 255, 1]
    address = serve(make_manifest())
    for ask in ask_with_floats(address, values):
        assert np.rint(ask() * 255).tolist() == expected
    for ask in ask_with_floats(address, np.ones((1, *SHAPE), np.float32)):
        assert np.rint(ask() * 255).tolist() == [1] * CLASSES
