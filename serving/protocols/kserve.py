"""`inference.GRPCInferenceService`, the Open Inference Protocol (KServe v2) with Triton's extensions.

A model has one input, which takes three forms by its datatype: UINT8 and FP32 pixels of 0 to 255,
[n, height, width, 3], and BYTES, [n] encoded images. Answers are always in `raw_output_contents`: tritonclient reads
nothing else.
"""

from __future__ import annotations

import functools
import struct
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from typing import NamedTuple, Protocol

import numpy as np
from google.protobuf import json_format, text_format
from google.protobuf.message import DecodeError

from export import triton
from protos import POOL
from protos import inference_pb2 as pb
from serving.errors import InvalidRequest, NotFound, ServingError, Unavailable, Unsupported
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.models.statistics import Counts, Duration
from serving.models.version_policy import ALL, VersionPolicy
from serving.protocols.calls import InferenceHandler, Query
from serving.protocols.inputs import InputDecoder, TensorLayout, to_bytes, to_priority
from serving.protocols.kserve_request import ENCODED, InferRequest, RequestParser
from serving.protocols.stream import StreamItem
from serving.runtimes.base import Images
from serving.scheduling.queue import DEFAULT_PRIORITY, PRIORITIES, BatchResult
from serving.transports.call import Call

EXTENSIONS = (
    "classification",
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)
DATATYPES = {"uint8": "UINT8", "float32": "FP32"}
PLATFORM = "onnxruntime_onnx"  # Triton's name of it


class RequestTerms(NamedTuple):
    """What a request asks of a model, and how its images came.

    Attributes:
        top_k: Classes to name; 0 asks for the probabilities.
        timeout: How long its caller waits at most, in seconds, whatever the deadline of the call; 0 is for ever.
        priority: Of the request.
        layout: That of its pixels; None for encoded images.
        inline: Whether the images are in the tensor, in place of the raw contents.
        id: The field of the response that gives the request's id back, serialized.
    """

    top_k: int
    timeout: float
    priority: int
    layout: TensorLayout | None
    inline: bool
    id: bytes


class Readiness(Protocol):
    """Says whether requests are taken."""

    ready: bool


class Repository(Protocol):
    """Takes models up and gives them up on request; errors are those of `serving.models.watcher.Watcher`."""

    def load(self, name: str, policy: VersionPolicy | None = None) -> None:
        """Serve what the repository holds of a model; None leaves the choice of versions as it is."""

    def unload(self, name: str) -> None:
        """Serve a model no longer."""


class KServe:
    """Reads requests of ModelInfer, and answers the other methods, for the clients of Triton and KServe."""

    def __init__(
        self,
        models: ModelRegistry,
        intake: InputDecoder,
        server: Readiness,
        repository: Repository | None,
        transport: str,
    ) -> None:
        """Ask `models`, with images that `intake` takes.

        Args:
            models: What is served.
            intake: Takes images.
            server: Says whether requests are taken.
            repository: To load models from; None is a server without one.
            transport: What receives calls, for people.
        """
        self._models, self._intake, self._server, self._repository = models, intake, server, repository
        self._transport = transport
        self._parser = RequestParser()

    def ServerLive(self, _: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        """Say that the server runs."""
        return pb.ServerLiveResponse(live=True)

    def ServerReady(self, _: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        """Say whether it takes requests."""
        return pb.ServerReadyResponse(ready=self._server.ready)

    def ModelReady(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """Say whether a model takes requests; one that is not there is an error."""
        self._find(request.name, request.version)
        return pb.ModelReadyResponse(ready=self._server.ready)

    def ServerMetadata(self, _: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        """Name the server, its version, and the extensions that it has."""
        extensions = (*EXTENSIONS, f"transport:{self._transport}")
        return pb.ServerMetadataResponse(name="resnet", version=version("resnet"), extensions=extensions)

    def ModelMetadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """Describe what a model takes and gives, and what was proved of it."""
        model = self._find(request.name, request.version)
        manifest = model.manifest
        tensors = [
            pb.ModelMetadataResponse.TensorMetadata(
                name=spec.name, datatype=DATATYPES[spec.dtype], shape=[-1, *spec.shape[1:]]
            )
            for spec in (manifest.input, manifest.output)
        ]
        return pb.ModelMetadataResponse(
            name=model.name,
            versions=[str(number) for number in sorted(self._models.get(model.name).versions)],
            platform=PLATFORM,
            inputs=tensors[:1],
            outputs=tensors[1:],
            properties={
                "certificate.images": str(manifest.certificate.images),
                "certificate.accuracy": f"{manifest.certificate.accuracy:.6f}",
                "certificate.max_difference": f"{_max_difference(model):.3g}",
                "manifest.digest": manifest.digest,
                "precision": model.precision,
            },
        )

    def ModelConfig(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """Return what config.pbtxt says to Triton, with this server's limit."""
        model = self._find(request.name, request.version)
        config = text_format.Parse(triton.config(model.manifest), pb.ModelConfig())
        config.platform, config.max_batch_size = PLATFORM, self._intake.max_images
        batching = config.dynamic_batching
        batching.priority_levels, batching.default_priority_level = len(PRIORITIES), DEFAULT_PRIORITY
        return pb.ModelConfigResponse(config=config)

    def ModelStatistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        """Count requests, images and batches of one model, or of all, since they were loaded."""
        chosen = [self._find(request.name, request.version)] if request.name else self._models
        counts = self._models.counts()
        return pb.ModelStatisticsResponse(
            model_stats=[_tell(model, counts.get((model.name, model.version), Counts())) for model in chosen]
        )

    def RepositoryIndex(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        """List the models that are served, and versions that are not, with the reason."""
        _check_repository(request.repository_name)
        index = pb.RepositoryIndexResponse.ModelIndex
        found = []
        for name in self._models.names():
            served = self._models.get(name)
            found += [index(name=name, version=str(number), state="READY") for number in sorted(served.versions)]
            if not request.ready:
                found += [
                    index(name=name, version=str(number), state="UNAVAILABLE", reason=reason)
                    for number, reason in sorted(served.refusals.items())
                ]
        return pb.RepositoryIndexResponse(models=found)

    def RepositoryModelLoad(self, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        """Serve what the repository holds of a model now; the parameter `config` may choose the versions.

        It is JSON, as Triton takes it, of which `version_policy` alone is known here: that is also how to roll back.
        """
        _check_repository(request.repository_name)
        self._control().load(request.model_name, _find_policy(request))
        return pb.RepositoryModelLoadResponse()

    def RepositoryModelUnload(self, request: pb.RepositoryModelUnloadRequest) -> pb.RepositoryModelUnloadResponse:
        """Serve a model no longer, until it is loaded again; no model depends on another here."""
        _check_repository(request.repository_name)
        self._control().unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    def parse(self, payload: bytes) -> InferRequest:
        """Return the request of ModelInfer that these bytes are, in its two parts."""
        return self._parser.parse(payload)

    def unpacks(self, request: InferRequest) -> bool:
        """Say whether it holds encoded images."""
        return request.head.encoded

    def find(self, request: InferRequest) -> Model:
        """Return the model that it names."""
        return self._find(request.head.name, request.head.version)

    def read(self, request: InferRequest, model: Model) -> Query:
        """Return what it asks the model."""
        terms = request.head.resolve(model, self._find_terms)
        images = self._read(request, terms, model)
        return Query(images, partial(_respond, terms, model), terms.timeout, terms.priority)

    def _control(self) -> Repository:
        if self._repository is None:
            raise Unsupported("this server has no repository to load models from")
        return self._repository

    def _find(self, name: str, version: str) -> Model:
        """Return a model; `version` is a number, a label, or empty for the latest."""
        if not self._server.ready:
            raise Unavailable("the server takes no requests now")
        if not version:
            return self._models.find(name)
        if not (version.isascii() and version.isdecimal() and len(version) < 20):  # Python refuses 4301 digits
            return self._models.find(name, label=version)
        if not int(version):
            raise NotFound(f"there is no version 0 of model {name!r}; versions begin with 1")
        return self._models.find(name, int(version))

    def _find_terms(self, request: pb.ModelInferRequest, model: Model) -> RequestTerms:
        """Return what a request asks, its raw contents apart."""
        timeout, top_k = _find_number(request, "timeout") / 1e6, _find_outputs(request, model)
        priority, wanted = to_priority(_find_number(request, "priority")), model.manifest.input.name
        if len(request.inputs) != 1 or request.inputs[0].name != wanted:
            names = [tensor.name for tensor in request.inputs]
            raise InvalidRequest(f"model {model.name!r} takes one input, {wanted!r}; the request has {names}")
        tensor = request.inputs[0]
        if "shared_memory_region" in tensor.parameters:
            raise Unsupported("this server reads no shared memory; send the tensor in the request")
        dtype = next((dtype for dtype, datatype in DATATYPES.items() if datatype == tensor.datatype), None)
        if dtype is None and tensor.datatype != ENCODED:
            raise InvalidRequest(f"input {wanted!r} is UINT8, FP32 or BYTES, not {tensor.datatype!r}")
        return RequestTerms(
            top_k,
            timeout,
            priority,
            self._intake.expect(tuple(tensor.shape), dtype, model) if dtype else None,
            tensor.HasField("contents"),
            pb.ModelInferResponse(id=request.id).SerializeToString(),
        )

    def _read(self, request: InferRequest, terms: RequestTerms, model: Model) -> Images:
        """Return the pixels of the one input, in whichever form they came."""
        raw, wanted = request.raw, model.manifest.input.name
        if raw and terms.inline:
            raise InvalidRequest(f"contents must not be set beside raw_input_contents, for input {wanted!r}")
        if len(raw) > 1:
            raise InvalidRequest(f"raw_input_contents has {len(raw)} entries for one input")
        if raw and terms.layout:
            return self._intake.read(raw[0], terms.layout)
        tensor = request.head.message.inputs[0]
        if terms.layout is None:
            files, shape = _unpack(bytes(raw[0])) if raw else list(tensor.contents.bytes_contents), list(tensor.shape)
            if shape not in ([len(files)], [len(files), 1]):
                raise InvalidRequest(f"input {wanted!r} has the shape {shape}, but {len(files)} encoded images")
            return self._intake.decode(files, model)
        values = tensor.contents
        is_uint8 = terms.layout.dtype == np.uint8
        data = to_bytes(values.uint_contents) if is_uint8 else np.array(values.fp32_contents, "<f4").tobytes()
        return self._intake.read(data, terms.layout)


class ModelStreamInfer:
    """What the messages of ModelStreamInfer are like.

    A request that fails does not end the stream. Its error is a message, unless the client asked with the header
    `triton_grpc_error: true` for it to become the status of the call.
    """

    ordered = True

    def __init__(self, inference: InferenceHandler[InferRequest], call: Call) -> None:
        """Have requests answered by `inference`."""
        self._inference = inference
        self._ends = ("triton_grpc_error", "true") in call.metadata

    def begin(self, item: StreamItem) -> None:
        """Have a message answered, as a call."""
        self._inference.begin(item)

    def respond(self, _: StreamItem, response: bytes) -> bytes:
        """Return the message that answers another."""
        message = pb.ModelStreamInferResponse()
        message.infer_response.MergeFromString(response)
        message.infer_response.parameters["triton_final_response"].bool_param = True
        return message.SerializeToString()

    def refuse(self, item: StreamItem, error: ServingError) -> bytes | ServingError:
        """Return the message that says why there is no answer, or the error that ends the stream."""
        if self._ends:
            return error
        message = pb.ModelStreamInferResponse(error_message=str(error))
        with suppress(DecodeError):
            request = pb.ModelInferRequest.FromString(item.payload)
            message.infer_response.model_name, message.infer_response.id = request.model_name, request.id
        message.infer_response.parameters["triton_final_response"].bool_param = True
        return message.SerializeToString()


def _check_repository(name: str) -> None:
    if name:
        raise Unsupported("there is one repository, which has no name: leave repository_name empty")


def _find_policy(request: pb.RepositoryModelLoadRequest) -> VersionPolicy | None:
    """Return the choice of versions that a request to load a model makes, if any."""
    unknown = sorted(request.parameters.keys() - {"config"})
    if unknown:
        raise Unsupported(f"this server loads what its repository holds, and takes no parameter {unknown[0]!r}")
    if "config" not in request.parameters:
        return None
    config = pb.ModelConfig()
    try:
        json_format.Parse(request.parameters["config"].string_param, config, descriptor_pool=POOL)
    except json_format.ParseError as error:
        raise InvalidRequest(f"the parameter config is no model configuration in JSON: {error}") from None
    policy = config.version_policy
    fields = [field.name for field, _ in config.ListFields()]
    match policy.WhichOneof("policy_choice"):
        case "latest" if fields == ["version_policy"] and policy.latest.num_versions:
            return VersionPolicy(latest=policy.latest.num_versions)
        case "all" if fields == ["version_policy"]:
            return ALL
        case "specific" if fields == ["version_policy"] and policy.specific.versions:
            return VersionPolicy(listed=tuple(policy.specific.versions))
        case _:
            raise InvalidRequest(
                "of the parameter config this server takes version_policy alone, with latest, all or specific versions"
            )


def _find_number(request: pb.ModelInferRequest, name: str) -> int:
    """Return a parameter that is a number, 0 if it is not there."""
    if name not in request.parameters:
        return 0
    parameter = request.parameters[name]
    kind = parameter.WhichOneof("parameter_choice")
    # tritonclient sends the one as int64, the other as uint64.
    if kind not in ("int64_param", "uint64_param") or getattr(parameter, kind) < 0:
        raise InvalidRequest(f"the parameter {name} is a number, int64 and not negative")
    number: int = getattr(parameter, kind)
    return number


def _find_outputs(request: pb.ModelInferRequest, model: Model) -> int:
    """Return how many classes the extension `classification` asks for; 0 asks for the probabilities."""
    wanted, classes = model.manifest.output.name, len(model.manifest.labels)
    if not request.outputs:
        return 0
    names = [output.name for output in request.outputs]
    if names != [wanted]:
        raise InvalidRequest(f"model {model.name!r} has one output, {wanted!r}; the request asks for {names}")
    parameters = request.outputs[0].parameters
    if "shared_memory_region" in parameters:
        raise Unsupported("this server writes no shared memory; take the tensor from the response")
    if "classification" not in parameters:
        return 0
    count = parameters["classification"].int64_param
    if not count >= 1:
        raise InvalidRequest(f"the parameter classification is a number of classes, at least 1, not {count}")
    return min(count, classes)


def _respond(terms: RequestTerms, model: Model, answer: BatchResult, _: int) -> bytes:
    """Return a serialized ModelInferResponse: bytes of messages one after the other are those of all they say."""
    probabilities = answer.probabilities
    if terms.top_k:
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, : terms.top_k]
        labels = model.manifest.labels
        texts = [
            f"{row[index]:f}:{index}:{labels[index]}".encode()
            for row, indices in zip(probabilities, best, strict=True)
            for index in indices
        ]
        datatype, shape, raw = ENCODED, best.shape, b"".join(struct.pack("<I", len(text)) + text for text in texts)
    else:
        datatype, shape, raw = "FP32", probabilities.shape, probabilities.astype("<f4", copy=False).tobytes()
    frame = _frame(model.name, model.version, model.manifest.output.name, datatype, shape, len(raw))
    return b"".join((frame, raw, terms.id))


@functools.lru_cache(1024)
def _frame(model: str, version: int, output: str, datatype: str, shape: tuple[int, ...], size: int) -> bytes:
    """Return what responses that are alike in all of this begin with, up to their raw contents of so many bytes."""
    tensor = pb.ModelInferResponse.InferOutputTensor(name=output, datatype=datatype, shape=shape)
    response = pb.ModelInferResponse(
        model_name=model, model_version=str(version), outputs=[tensor], raw_output_contents=[bytes(size)]
    )
    return response.SerializeToString().removesuffix(bytes(size))


def _unpack(raw: bytes) -> list[bytes]:
    """Take a BYTES tensor apart: each element is its length, 4 bytes little-endian, and its bytes."""
    found, at = [], 0
    while at < len(raw):
        if at + 4 > len(raw) or (end := at + 4 + struct.unpack_from("<I", raw, at)[0]) > len(raw):
            raise InvalidRequest(f"the BYTES tensor is cut off: an element begins at byte {at} of {len(raw)}")
        found.append(raw[at + 4 : end])
        at = end
    return found


def _max_difference(model: Model) -> float:
    name = "onnx" if model.precision == "fp32" else f"onnx-{model.precision}"
    variant = model.manifest.certificate.find(name)
    return max((row.max_difference for row in variant.rows), default=0.0) if variant else 0.0


def _tell(model: Model, found: Counts) -> pb.ModelStatistics:
    return pb.ModelStatistics(
        name=model.name,
        version=str(model.version),
        last_inference=found.last_ms,
        inference_count=found.images,
        execution_count=sum(batch.count for batch in found.batches.values()),
        inference_stats=pb.InferStatistics(
            success=_total(found.success),
            fail=_total(found.fail),
            queue=_total(found.queue),
            compute_input=_total(found.decode),
            compute_infer=_total(found.compute),
            compute_output=_total(found.respond),
        ),
        batch_stats=[
            pb.InferBatchStatistics(batch_size=size, compute_infer=_total(batch))
            for size, batch in sorted(found.batches.items())
        ],
    )


def _total(duration: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=duration.count, ns=duration.ns)
