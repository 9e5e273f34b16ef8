"""Valid requests for a model, in every protocol and form, as they go over the wire."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.load.endpoints import PROTOCOLS, Input
from export import manifest, reference, repository
from export.manifest import Manifest
from protos import classifier_pb2 as pb
from protos import inference_pb2, tensorflow_pb2, tensorflow_serving_pb2
from tests.acceptance.attempts.attempt import CLASSIFY, INFER, PREDICT


class ValidRequest(NamedTuple):
    """A serialized request, and the method that takes it."""

    path: str
    message: bytes


class ModelUnderTest:
    """The latest version of the first model of a repository, with images that it was not trained on.

    Attributes:
        folder: Folder of the version.
        manifest: Its manifest.
        pixels: Held-out images, uint8 [n, height, width, 3].
    """

    def __init__(self, folder: Path) -> None:
        """Take a model repository."""
        self.folder = repository.latest(repository.models(folder)[0])
        self.manifest: Manifest = manifest.read(self.folder)
        self.pixels: NDArray[np.uint8] = reference.load(self.folder, self.manifest).images

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.manifest.model

    def classify(self, images: int = 1, top_k: int = 0, name: str = "") -> ValidRequest:
        """Return a request of pixels to our own protocol; to this model, or one of another `name`."""
        pixels = self.pixels[:images]
        tensor = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=pixels.shape, data=pixels.tobytes())
        message = pb.ClassifyRequest(model=name or self.name, tensor=tensor, top_k=top_k or len(self.manifest.labels))
        return ValidRequest(CLASSIFY, message.SerializeToString())

    def classify_file(self, kind: str = "JPEG", size: int = 256) -> ValidRequest:
        """Return a request of one image file."""
        encoded = pb.EncodedImages(images=[self.draw(kind, size)])
        return ValidRequest(CLASSIFY, pb.ClassifyRequest(model=self.name, encoded=encoded).SerializeToString())

    def infer(self, images: int = 1, datatype: str = "UINT8") -> ValidRequest:
        """Return a request of pixels to KServe's protocol."""
        pixels: NDArray[Any] = self.pixels[:images].astype({"UINT8": "u1", "FP32": "<f4"}[datatype])
        return ValidRequest(INFER, PROTOCOLS["kserve"].pack(self._describe(images, datatype), pixels))

    def infer_file(self, kind: str = "PNG") -> ValidRequest:
        """Return a request of one image file to KServe's protocol."""
        file = self.draw(kind)
        tensor = inference_pb2.ModelInferRequest.InferInputTensor(
            name=self.manifest.input.name, datatype="BYTES", shape=[1]
        )
        raw = struct.pack("<I", len(file)) + file
        request = inference_pb2.ModelInferRequest(model_name=self.name, inputs=[tensor], raw_input_contents=[raw])
        return ValidRequest(INFER, request.SerializeToString())

    def predict(self, images: int = 1) -> ValidRequest:
        """Return a request of pixels to TensorFlow Serving's protocol."""
        return ValidRequest(PREDICT, PROTOCOLS["tfs"].pack(self._describe(images, "UINT8"), self.pixels[:images]))

    def predict_file(self, kind: str = "PNG") -> ValidRequest:
        """Return a request of one image file to TensorFlow Serving's protocol."""
        tensor = tensorflow_pb2.TensorProto(
            dtype=tensorflow_pb2.DT_STRING,
            tensor_shape=tensorflow_pb2.TensorShapeProto(dim=[tensorflow_pb2.TensorShapeProto.Dim(size=1)]),
            string_val=[self.draw(kind)],
        )
        spec = tensorflow_serving_pb2.ModelSpec(name=self.name, signature_name="serving_default")
        request = tensorflow_serving_pb2.PredictRequest(model_spec=spec, inputs={self.manifest.input.name: tensor})
        return ValidRequest(PREDICT, request.SerializeToString())

    def list_requests(self) -> list[ValidRequest]:
        """Return requests of every protocol and form."""
        return [
            self.classify(2),
            self.classify_file("PNG", 24),
            self.infer(2),
            self.infer(1, "FP32"),
            self.infer_file(),
            self.predict(2),
            self.predict_file(),
        ]

    def draw(self, kind: str, size: int = 24) -> bytes:
        """Return the first image as a file of this kind, `size` pixels high and wide."""
        file = io.BytesIO()
        Image.fromarray(self.pixels[0]).resize((size, size)).save(file, kind)
        return file.getvalue()

    def _describe(self, images: int, datatype: str) -> Input:
        shape = (images, *self.pixels.shape[1:])
        return Input(self.name, self.manifest.input.name, shape, datatype)
