"""`inference.GRPCInferenceService`, the Open Inference Protocol (KServe v2) with Triton's extensions.

A model has one input, which takes three forms by its datatype: UINT8 and FP32 pixels of 0 to 255,
[n, height, width, 3], and BYTES, [n] encoded images. Answers are always in `raw_output_contents`: tritonclient reads
nothing else.
"""

from __future__ import annotations

import functools
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import NamedTuple, Protocol

import grpc
import numpy as np
from google.protobuf import json_format, text_format

from export import triton
from protos import POOL
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceServicer
from serving.batcher import DEFAULT_PRIORITY, PRIORITIES
from serving.calls import Job, Work, answer, find_deadline, name_method, report, tells_failures
from serving.engine import Images, Probabilities
from serving.errors import InvalidRequest, NotFound, Unavailable, Unsupported, to_trailers
from serving.events import computed
from serving.intake import Intake, to_bytes, to_priority
from serving.models import Model, Models
from serving.policy import ALL, Policy
from serving.statistics import Counts, Duration

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
LENGTH_DELIMITED = 2  # the wire type of texts, bytes and messages
LARGE_BYTES = 2**18  # from here on copies of a request cost more than to look for its parts


class SplitRequest(NamedTuple):
    """A request, and apart from it its raw contents, which are views of the bytes that came."""

    message: pb.ModelInferRequest
    raw: Sequence[bytes | memoryview]


class Readiness(Protocol):
    """Says whether requests are taken."""

    ready: bool


class Repository(Protocol):
    """Takes models up and gives them up on request; errors are those of `serving.watcher.Watcher`."""

    def load(self, name: str, policy: Policy | None = None) -> None:
        """Serve what the repository holds of a model; None leaves the choice of versions as it is."""

    def unload(self, name: str) -> None:
        """Serve a model no longer."""


class InferenceServicer(GRPCInferenceServiceServicer):
    """Answers the clients of Triton and KServe."""

    def __init__(self, models: Models, intake: Intake, server: Readiness, repository: Repository | None = None) -> None:
        """Serve `models`, to requests that `intake` takes; None is a server without a repository to load from."""
        self._models, self._intake, self._server, self._repository = models, intake, server, repository

    def ServerLive(self, request: pb.ServerLiveRequest, context: grpc.ServicerContext) -> pb.ServerLiveResponse:  # noqa: ARG002
        """Say that the server runs."""
        return pb.ServerLiveResponse(live=True)

    def ServerReady(self, request: pb.ServerReadyRequest, context: grpc.ServicerContext) -> pb.ServerReadyResponse:  # noqa: ARG002
        """Say whether it takes requests."""
        return pb.ServerReadyResponse(ready=self._server.ready)

    @tells_failures
    def ModelReady(self, request: pb.ModelReadyRequest, context: grpc.ServicerContext) -> pb.ModelReadyResponse:  # noqa: ARG002
        """Say whether a model takes requests; one that is not there is an error."""
        self._find(request.name, request.version)
        return pb.ModelReadyResponse(ready=self._server.ready)

    def ServerMetadata(
        self,
        request: pb.ServerMetadataRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.ServerMetadataResponse:
        """Name the server, its version, and the extensions that it has."""
        return pb.ServerMetadataResponse(name="resnet", version=version("resnet"), extensions=EXTENSIONS)

    @tells_failures
    def ModelMetadata(
        self,
        request: pb.ModelMetadataRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.ModelMetadataResponse:
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

    @tells_failures
    def ModelConfig(self, request: pb.ModelConfigRequest, context: grpc.ServicerContext) -> pb.ModelConfigResponse:  # noqa: ARG002
        """Return what config.pbtxt says to Triton, with this server's limit."""
        model = self._find(request.name, request.version)
        config = text_format.Parse(triton.config(model.manifest), pb.ModelConfig())
        config.platform, config.max_batch_size = PLATFORM, self._intake.max_images
        batching = config.dynamic_batching
        batching.priority_levels, batching.default_priority_level = len(PRIORITIES), DEFAULT_PRIORITY
        return pb.ModelConfigResponse(config=config)

    @tells_failures
    def ModelStatistics(
        self,
        request: pb.ModelStatisticsRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.ModelStatisticsResponse:
        """Count requests, images and batches of one model, or of all, since they were loaded."""
        chosen = [self._find(request.name, request.version)] if request.name else self._models
        counts = self._models.counts()
        return pb.ModelStatisticsResponse(
            model_stats=[_tell(model, counts.get((model.name, model.version), Counts())) for model in chosen]
        )

    @tells_failures
    def RepositoryIndex(
        self,
        request: pb.RepositoryIndexRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.RepositoryIndexResponse:
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

    @tells_failures
    def RepositoryModelLoad(
        self,
        request: pb.RepositoryModelLoadRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.RepositoryModelLoadResponse:
        """Serve what the repository holds of a model now; the parameter `config` may choose the versions.

        It is JSON, as Triton takes it, of which `version_policy` alone is known here: that is also how to roll back.
        """
        _check_repository(request.repository_name)
        self._control().load(request.model_name, _find_policy(request))
        return pb.RepositoryModelLoadResponse()

    @tells_failures
    def RepositoryModelUnload(
        self,
        request: pb.RepositoryModelUnloadRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.RepositoryModelUnloadResponse:
        """Serve a model no longer, until it is loaded again; no model depends on another here."""
        _check_repository(request.repository_name)
        self._control().unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    @computed(unpacks=lambda request: "BYTES" in [tensor.datatype for tensor in _split(request).message.inputs])
    def ModelInfer(
        self, request: pb.ModelInferRequest | SplitRequest, context: grpc.ServicerContext
    ) -> Work[pb.ModelInferResponse]:
        """Answer one request."""
        return self._infer(request, context)

    def ModelStreamInfer(
        self, request_iterator: Iterable[pb.ModelInferRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ModelStreamInferResponse]:
        """Answer requests as they come, in their order; one that fails does not end the stream.

        Its error is a message of the stream, unless the client asked with the header `triton_grpc_error: true` for it
        to become the status of the call.
        """
        ends = ("triton_grpc_error", "true") in {(key, value) for key, value in context.invocation_metadata()}
        for request in request_iterator:
            started = time.perf_counter_ns()
            try:
                response = answer(self._infer(request, context), context)
            except Exception as error:
                refusal = report(error, name_method(self, self.ModelStreamInfer), context, started)
                if ends:
                    context.set_trailing_metadata(to_trailers(refusal))
                    context.abort(refusal.code, str(refusal))
                failed = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
                failed.parameters["triton_final_response"].bool_param = True
                yield pb.ModelStreamInferResponse(error_message=str(refusal), infer_response=failed)
            else:
                response.parameters["triton_final_response"].bool_param = True
                yield pb.ModelStreamInferResponse(infer_response=response)

    def _infer(
        self, whole: pb.ModelInferRequest | SplitRequest, context: grpc.ServicerContext
    ) -> Work[pb.ModelInferResponse]:
        request, raw = _split(whole)
        deadline = min(find_deadline(context), _find_timeout(request))
        model = self._find(request.model_name, request.model_version)
        with model.statistics.request() as record:
            top_k, priority = _find_outputs(request, model), to_priority(_find_number(request, "priority"))
            images = self._images(request, raw, model)
            record.decoded()
            record.answer = yield Job(model.batcher, images, deadline, priority)
            return _respond(request, model, record.answer.probabilities, top_k)

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

    def _images(self, request: pb.ModelInferRequest, raw: Sequence[bytes | memoryview], model: Model) -> Images:
        """Return the pixels of the one input, in whichever form they came."""
        wanted = model.manifest.input.name
        if len(request.inputs) != 1 or request.inputs[0].name != wanted:
            names = [tensor.name for tensor in request.inputs]
            raise InvalidRequest(f"model {model.name!r} takes one input, {wanted!r}; the request has {names}")
        tensor = request.inputs[0]
        if "shared_memory_region" in tensor.parameters:
            raise Unsupported("this server reads no shared memory; send the tensor in the request")
        if raw and tensor.HasField("contents"):
            raise InvalidRequest(f"contents must not be set beside raw_input_contents, for input {wanted!r}")
        if len(raw) > 1:
            raise InvalidRequest(f"raw_input_contents has {len(raw)} entries for one input")
        shape = list(tensor.shape)
        match tensor.datatype:
            case "BYTES":
                files = _unpack(bytes(raw[0])) if raw else list(tensor.contents.bytes_contents)
                if shape not in ([len(files)], [len(files), 1]):
                    raise InvalidRequest(f"input {wanted!r} has the shape {shape}, but {len(files)} encoded images")
                return self._intake.decode(files, model)
            case "UINT8":
                data = raw[0] if raw else to_bytes(tensor.contents.uint_contents)
                return self._intake.read(data, shape, "uint8", model)
            case "FP32":
                data = raw[0] if raw else np.array(tensor.contents.fp32_contents, "<f4").tobytes()
                return self._intake.read(data, shape, "float32", model)
            case other:
                raise InvalidRequest(f"input {wanted!r} is UINT8, FP32 or BYTES, not {other!r}")


def parse(payload: bytes) -> pb.ModelInferRequest | SplitRequest:
    """Return a request; one that is large without the two copies of its raw contents that protobuf would make.

    Raises:
        google.protobuf.message.DecodeError: The bytes are no such message.
    """
    if len(payload) < LARGE_BYTES:
        return pb.ModelInferRequest.FromString(payload)
    view, kept, raw, at = memoryview(payload), [], [], 0
    try:
        while at < len(payload):
            start = at
            tag, at = _read_varint(payload, at)
            size, at = _read_varint(payload, at)
            if tag & 7 != LENGTH_DELIMITED or (end := at + size) > len(payload):
                return pb.ModelInferRequest.FromString(payload)  # protobuf knows what to make of it
            if tag >> 3 == pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER:
                raw.append(view[at:end])
            else:
                kept.append(view[start:end])
            at = end
    except IndexError:
        return pb.ModelInferRequest.FromString(payload)
    return SplitRequest(pb.ModelInferRequest.FromString(b"".join(kept)), raw)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of protobuf's encoding, and where the next byte is: seven bits a byte, the lowest first."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _split(request: pb.ModelInferRequest | SplitRequest) -> SplitRequest:
    return request if isinstance(request, SplitRequest) else SplitRequest(request, request.raw_input_contents)


def _check_repository(name: str) -> None:
    if name:
        raise Unsupported("there is one repository, which has no name: leave repository_name empty")


def _find_policy(request: pb.RepositoryModelLoadRequest) -> Policy | None:
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
            return Policy(latest=policy.latest.num_versions)
        case "all" if fields == ["version_policy"]:
            return ALL
        case "specific" if fields == ["version_policy"] and policy.specific.versions:
            return Policy(listed=tuple(policy.specific.versions))
        case _:
            raise InvalidRequest(
                "of the parameter config this server takes version_policy alone, with latest, all or specific versions"
            )


def _find_timeout(request: pb.ModelInferRequest) -> float:
    """Return when the parameter `timeout`, in microseconds, ends the wait; 0 is never."""
    microseconds = _find_number(request, "timeout")
    return time.monotonic() + microseconds / 1e6 if microseconds else float("inf")


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


def _respond(
    request: pb.ModelInferRequest, model: Model, probabilities: Probabilities, top_k: int
) -> pb.ModelInferResponse:
    if top_k:
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        labels = model.manifest.labels
        texts = [
            f"{row[index]:f}:{index}:{labels[index]}".encode()
            for row, indices in zip(probabilities, best, strict=True)
            for index in indices
        ]
        datatype, shape, raw = "BYTES", best.shape, b"".join(struct.pack("<I", len(text)) + text for text in texts)
    else:
        datatype, shape, raw = "FP32", probabilities.shape, probabilities.astype("<f4", copy=False).tobytes()
    response = pb.ModelInferResponse()
    response.CopyFrom(_frame(model.name, model.version, model.manifest.output.name, datatype, shape))
    response.id = request.id
    response.raw_output_contents.append(raw)
    return response


@functools.lru_cache(1024)
def _frame(model: str, version: int, output: str, datatype: str, shape: tuple[int, ...]) -> pb.ModelInferResponse:
    """Return what all responses have in common that are alike in all of this; to copy, because that is quicker."""
    tensor = pb.ModelInferResponse.InferOutputTensor(name=output, datatype=datatype, shape=shape)
    return pb.ModelInferResponse(model_name=model, model_version=str(version), outputs=[tensor])


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
