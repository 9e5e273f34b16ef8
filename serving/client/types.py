"""What a client asks and hears, as plain values, and as the messages of the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from protos import classifier_pb2 as pb

ImageInput = bytes | NDArray[np.uint8]
"""A file, JPEG or PNG; or pixels, uint8 [height, width, 3], of the size that the model takes."""

ImageInputs = Sequence[bytes] | NDArray[np.uint8]
"""Files, each JPEG or PNG; or pixels, uint8 [n, height, width, 3], of the size that the model takes."""


@dataclass(frozen=True)
class Class:
    """One class of an image: its name, its place among the model's outputs, its probability."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Answer:
    """What the server said of images.

    The figures are those of the request that carried the images. Where it took several requests, each figure is the
    largest among them: they are under way side by side, so that sums would be longer than the wait.

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

    def split(self) -> list[Answer]:
        """Return an answer for each image."""
        return [replace(self, images=(classes,)) for classes in self.images]

    @classmethod
    def join(cls, answers: Sequence[Answer]) -> Answer:
        """Return one answer for the images of several, which are of one version of one model."""
        return cls(
            model=answers[0].model,
            version=answers[0].version,
            images=tuple(classes for answer in answers for classes in answer.images),
            decode_ns=max(answer.decode_ns for answer in answers),
            queue_ns=max(answer.queue_ns for answer in answers),
            compute_ns=max(answer.compute_ns for answer in answers),
            batch_size=max(answer.batch_size for answer in answers),
        )


@dataclass(frozen=True)
class ClassifyOptions:
    """What is asked of every image.

    Attributes:
        top_k: Classes to return; 0 asks for 5, or all where there are fewer.
        model: Name of the model; may be empty where the server has just one.
        version: Its number, or a label of the server's; 0 asks for the latest.
    """

    top_k: int = 0
    model: str = ""
    version: int | str = 0

    def to_request(self, images: ImageInputs) -> pb.ClassifyRequest:
        """Return the message that asks it of `images`.

        Raises:
            TypeError: They are pixels, and not uint8.
        """
        request = pb.ClassifyRequest(model=self.model, top_k=self.top_k)
        if isinstance(self.version, str):
            request.version_label = self.version
        else:
            request.version = self.version
        if not isinstance(images, np.ndarray):
            request.encoded.images.extend(images)
            return request
        if images.dtype != np.uint8:
            raise TypeError(f"pixels must be uint8, from 0 to 255, not {images.dtype}")
        request.tensor.data_type = pb.DATA_TYPE_UINT8
        request.tensor.shape.extend(images.shape)
        request.tensor.data = images.tobytes()
        return request


def to_answer(response: pb.ClassifyResponse) -> Answer:
    """Return the answer that a message holds."""
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
