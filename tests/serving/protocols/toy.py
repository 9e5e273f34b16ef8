"""`toy.v1.Toy`: the pixels of one image in, its label out, without protobuf; all that a protocol needs."""

from __future__ import annotations

from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.protocols.base import ServerContext
from serving.protocols.handler import InferenceHandler, ParsedRequest
from serving.protocols.inputs import Check, InputDecoder
from serving.protocols.outputs import find_top
from serving.scheduling.queue import BatchResult
from serving.transports.call import Call, Methods, Unary

SERVICES = ("toy.v1.Toy",)


class Toy:
    """Reads requests."""

    def __init__(self, models: ModelRegistry, decoder: InputDecoder) -> None:
        self._models, self._decoder = models, decoder

    def parse(self, payload: bytes) -> bytes:
        """Return the pixels."""
        return payload

    def is_slow(self, _: bytes) -> bool:
        """Return that pixels are not."""
        return False

    def find(self, _: bytes, __: Call) -> Model:
        """Return the only model."""
        return self._models.find("")

    def read(self, request: bytes, model: Model, _: Check) -> ParsedRequest:
        """Return the image, and what makes a label of its probabilities."""
        layout = self._decoder.expect((1, *model.image_shape), "uint8", model)

        def respond(result: BatchResult, _: int) -> bytes:
            return model.manifest.labels[find_top(result.probabilities, 1)[0, 0]].encode()

        return ParsedRequest(self._decoder.read(request, layout), respond)


def find_methods(context: ServerContext) -> Methods:
    """Return the one method."""
    handler = InferenceHandler(Toy(context.models, context.decoder), context.models, context.workers)
    return {"/toy.v1.Toy/Classify": Unary(handler.answer)}
