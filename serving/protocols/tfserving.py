"""`tensorflow.serving.PredictionService` and `ModelService`, without TensorFlow.

A model has the signature `serving_default`, with one input: DT_UINT8 or DT_FLOAT pixels of 0 to 255,
[n, height, width, channels], or DT_STRING, [n] encoded images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from export.manifest import TensorSpec
from protos import tensorflow_pb2 as tf
from protos import tensorflow_serving_pb2 as pb
from serving.errors import STATUSES, FailedPrecondition, InvalidRequest, Unsupported
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.models.split import FindKey
from serving.protocols.base import ServerContext, reply_methods, services_of
from serving.protocols.handler import InferenceHandler, ParsedRequest
from serving.protocols.inputs import Check, InputDecoder, to_bytes, to_version
from serving.runtimes.base import Images
from serving.scheduling.queue import BatchResult
from serving.transports.call import Call, Methods, Unary

SERVICES = services_of(pb.DESCRIPTOR)
PREDICT = "/tensorflow.serving.PredictionService/Predict"
SIGNATURE, SIGNATURE_DEF, METHOD = "serving_default", "signature_def", "tensorflow/serving/predict"
TYPES = {"uint8": tf.DT_UINT8, "float32": tf.DT_FLOAT}


class TfServing:
    """Reads requests of Predict, and answers the other methods."""

    def __init__(self, models: ModelRegistry, decoder: InputDecoder) -> None:
        """Find models in `models`, and decode images with `decoder`."""
        self._models, self._decoder = models, decoder

    def parse(self, payload: bytes) -> pb.PredictRequest:
        """Return the request."""
        return pb.PredictRequest.FromString(payload)

    def is_slow(self, request: pb.PredictRequest) -> bool:
        """Return whether its images are encoded."""
        return any(tensor.dtype == tf.DT_STRING for tensor in request.inputs.values())

    def find(self, request: pb.PredictRequest, call: Call) -> Model:
        """Return the model that the request names."""
        return _find(self._models, request.model_spec, call.find_key)

    def read(self, request: pb.PredictRequest, model: Model, check: Check) -> ParsedRequest:
        """Return what the request asks of the model."""
        output = model.manifest.output.name
        if list(request.output_filter) not in ([], [output]):
            raise InvalidRequest(f"model {model.name!r} has one output, {output!r}; output_filter names others")
        return ParsedRequest(self._read_images(request, model, check), partial(_respond, model))

    def GetModelMetadata(self, request: pb.GetModelMetadataRequest) -> pb.GetModelMetadataResponse:
        """Describe the signature of a model."""
        if list(request.metadata_field) != [SIGNATURE_DEF]:
            raise InvalidRequest(f"metadata_field must be [{SIGNATURE_DEF!r}], not {list(request.metadata_field)}")
        model = _find(self._models, request.model_spec)
        source, target = model.manifest.input, model.manifest.output
        signature = tf.SignatureDef(
            inputs={source.name: _describe(source)}, outputs={target.name: _describe(target)}, method_name=METHOD
        )
        response = pb.GetModelMetadataResponse(model_spec=_specify(model))
        response.metadata[SIGNATURE_DEF].Pack(pb.SignatureDefMap(signature_def={SIGNATURE: signature}))
        return response

    def Classify(self, _: pb.ClassificationRequest) -> pb.ClassificationResponse:
        """Refuse."""
        raise Unsupported("Classify takes tf.Example records, which hold no images; call Predict")

    def Regress(self, _: pb.RegressionRequest) -> pb.RegressionResponse:
        """Refuse."""
        raise Unsupported("the models are classifiers; call Predict")

    def MultiInference(self, _: pb.MultiInferenceRequest) -> pb.MultiInferenceResponse:
        """Refuse."""
        raise Unsupported("MultiInference takes tf.Example records, which hold no images; call Predict")

    def GetModelStatus(self, request: pb.GetModelStatusRequest) -> pb.GetModelStatusResponse:
        """Return the status of all versions of a model, or of the one that the request names."""
        spec = request.model_spec
        served = self._models.get(spec.name)
        chosen = served.versions.keys() | served.refusals.keys()
        match spec.WhichOneof("version_choice"):
            case "version":
                chosen &= {spec.version.value}
            case "version_label":
                chosen &= {_find(self._models, spec).version}
        if not chosen:
            chosen = {_find(self._models, spec).version}  # raises the error
        return pb.GetModelStatusResponse(
            model_version_status=[_to_status(number, served.refusals.get(number)) for number in sorted(chosen)]
        )

    def _read_images(self, request: pb.PredictRequest, model: Model, check: Check) -> Images:
        """Return the pixels of the one input, in whichever form they came."""
        name = model.manifest.input.name
        if list(request.inputs) != [name]:
            raise InvalidRequest(
                f"model {model.name!r} takes one input, {name!r}; the request has {sorted(request.inputs)}"
            )
        tensor = request.inputs[name]
        shape = [axis.size for axis in tensor.tensor_shape.dim]
        # One value may stand for all, but only in a shape that the decoder takes.
        fits = tuple(shape[1:]) == model.image_shape and 0 < shape[0] <= self._decoder.max_images
        size = math.prod(shape) if fits else 0
        match tensor.dtype:
            case tf.DT_STRING:
                files = list(tensor.string_val)
                if shape != [len(files)]:
                    raise InvalidRequest(f"input {name!r} has the shape {shape}, but {len(files)} encoded images")
                return self._decoder.decode(files, model, check)
            case tf.DT_UINT8:
                data = tensor.tensor_content or _repeat(to_bytes(tensor.int_val), 1, size)
                return self._decoder.read(data, self._decoder.expect(shape, "uint8", model))
            case tf.DT_FLOAT:
                values = np.array(tensor.float_val, "<f4").tobytes()
                layout = self._decoder.expect(shape, "float32", model)
                return self._decoder.read(tensor.tensor_content or _repeat(values, 4, size), layout)
            case other:
                raise InvalidRequest(f"input {name!r} is DT_UINT8, DT_FLOAT or DT_STRING, not of dtype {other}")


def find_methods(context: ServerContext) -> Methods:
    """Return the methods of both services, by path."""
    protocol = TfServing(context.models, context.decoder)
    handler = InferenceHandler(protocol, context.models, context.workers)
    methods = reply_methods(pb.DESCRIPTOR, protocol, context.control, skip=("Predict",))
    return methods | {PREDICT: Unary(handler.answer)}


def _respond(model: Model, result: BatchResult, _: int) -> bytes:
    probabilities = result.probabilities
    tensor = tf.TensorProto(
        dtype=tf.DT_FLOAT, tensor_shape=_shape(probabilities.shape), float_val=probabilities.ravel().tolist()
    )
    return pb.PredictResponse(
        outputs={model.manifest.output.name: tensor}, model_spec=_specify(model)
    ).SerializeToString()


def _to_status(version: int, refusal: str | None) -> pb.ModelVersionStatus:
    state = pb.ModelVersionStatus
    if refusal is None:
        return state(version=version, state=state.AVAILABLE, status=pb.StatusProto())
    status = pb.StatusProto(error_code=STATUSES[FailedPrecondition].code, error_message=refusal)
    return state(version=version, state=state.END, status=status)


def _find(models: ModelRegistry, spec: pb.ModelSpec, find_key: FindKey | None = None) -> Model:
    if spec.signature_name not in ("", SIGNATURE):
        raise FailedPrecondition(f"there is no signature {spec.signature_name!r}; models have {SIGNATURE!r}")
    match spec.WhichOneof("version_choice"):
        case "version":
            number = spec.version.value
            if number < 1:
                raise InvalidRequest(f"the version is {number}; versions begin with 1, and none means the default")
            return models.find(spec.name, number)
        case "version_label":
            label = spec.version_label
            if numbered := to_version(label):  # perf_analyzer gives the version as a label
                return models.find(spec.name, numbered)
            return models.find(spec.name, 0, label, find_key)
        case _:
            return models.find(spec.name, find_key=find_key)


def _specify(model: Model) -> pb.ModelSpec:
    spec = pb.ModelSpec(name=model.name, signature_name=SIGNATURE)
    spec.version.value = model.version
    return spec


def _describe(spec: TensorSpec) -> tf.TensorInfo:
    return tf.TensorInfo(name=f"{spec.name}:0", dtype=TYPES[spec.dtype], tensor_shape=_shape(spec.shape))


def _shape(sizes: Sequence[int]) -> tf.TensorShapeProto:
    return tf.TensorShapeProto(dim=[tf.TensorShapeProto.Dim(size=size) for size in sizes])


def _repeat(data: bytes, item: int, size: int) -> bytes:
    """Return `size` copies of `data` if it holds one value of `item` bytes, else `data`."""
    return data * size if len(data) == item and size else data
