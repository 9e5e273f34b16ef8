"""The methods of `inference.GRPCInferenceService` that compute nothing: health, metadata, statistics, repository."""

from __future__ import annotations

from google.protobuf import json_format, text_format

from export import triton
from protos import POOL
from protos import inference_pb2 as pb
from resnet.packages import VERSION
from serving.errors import InvalidRequest, NotFound, Unavailable, Unsupported
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.models.split import FindKey
from serving.models.statistics import Counts, Duration
from serving.models.version_policy import ALL, VersionPolicy
from serving.protocols.base import RepositoryControl, ServerContext, ServerState
from serving.protocols.inputs import to_version
from serving.runtimes.proof import Proof
from serving.scheduling.queue import DEFAULT_PRIORITY, PRIORITIES

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


class KServeControl:
    """Answers the methods that compute nothing, for the clients of Triton and KServe."""

    def __init__(self, context: ServerContext) -> None:
        """Answer for the server of `context`."""
        self._models, self._server, self._repository = context.models, context.server, context.repository
        self._transport, self._max_images = context.transport, context.decoder.max_images

    def ServerLive(self, _: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        """Return whether requests get through the server; if not, only a restart helps."""
        return pb.ServerLiveResponse(live=self._server.live)

    def ServerReady(self, _: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        """Return whether the server takes requests, and has a model for them."""
        return pb.ServerReadyResponse(ready=self._server.ready and self._models.serves_any())

    def ModelReady(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """Return whether a model takes requests; an unknown model is an error."""
        self._find(request.name, request.version)
        return pb.ModelReadyResponse(ready=self._server.ready)

    def ServerMetadata(self, _: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        """Return the name of the server, its version and its extensions."""
        extensions = (*EXTENSIONS, f"transport:{self._transport}")
        return pb.ServerMetadataResponse(name="resnet", version=VERSION, extensions=extensions)

    def ModelMetadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """Describe the input and output of a model, and its certificate."""
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
                **_describe_proof(model.proof),
            },
        )

    def ModelConfig(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """Return the model's config.pbtxt, with the limits of this server."""
        model = self._find(request.name, request.version)
        config = text_format.Parse(triton.config(model.manifest), pb.ModelConfig())
        config.platform, config.max_batch_size = PLATFORM, self._max_images
        batching = config.dynamic_batching
        batching.priority_levels, batching.default_priority_level = len(PRIORITIES), DEFAULT_PRIORITY
        return pb.ModelConfigResponse(config=config)

    def ModelStatistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        """Return the statistics of one model, or of all, since they were loaded."""
        chosen = [self._find(request.name, request.version)] if request.name else self._models
        counts = self._models.counts()
        return pb.ModelStatisticsResponse(
            model_stats=[_to_statistics(model, counts.get((model.name, model.version), Counts())) for model in chosen]
        )

    def RepositoryIndex(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        """List the served versions, the refused ones, and the one that is or was rolled out, with the reason."""
        _check_repository(request.repository_name)
        index = pb.RepositoryIndexResponse.ModelIndex
        entries = []
        for name in self._models.names():
            served = self._models.get(name)
            entries += [
                index(name=name, version=str(number), state="READY", reason=served.remarks.get(number, ""))
                for number in sorted(served.versions)
            ]
            if not request.ready:
                reasons = {**served.remarks, **served.refusals}
                entries += [
                    index(name=name, version=str(number), state="UNAVAILABLE", reason=reason)
                    for number, reason in sorted(reasons.items())
                    if number not in served.versions
                ]
        return pb.RepositoryIndexResponse(models=entries)

    def RepositoryModelLoad(self, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        """Load a model from the repository; the parameter `config` may choose the versions, also to roll back.

        It is a Triton model configuration in JSON, with `version_policy` only.
        """
        _check_repository(request.repository_name)
        self._control().load(request.model_name, _to_policy(request))
        return pb.RepositoryModelLoadResponse()

    def RepositoryModelUnload(self, request: pb.RepositoryModelUnloadRequest) -> pb.RepositoryModelUnloadResponse:
        """Stop serving a model until it is loaded again."""
        _check_repository(request.repository_name)
        self._control().unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    def _control(self) -> RepositoryControl:
        if self._repository is None:
            raise Unsupported("this server has no repository to load models from")
        return self._repository

    def _find(self, name: str, version: str) -> Model:
        return find_model(self._models, self._server, name, version)


def find_model(
    models: ModelRegistry, server: ServerState, name: str, version: str, find_key: FindKey | None = None
) -> Model:
    """Return a model.

    Args:
        models: The served models.
        server: Must take requests.
        name: Name of the model; may be empty where there is just one.
        version: A number, a label, or empty for the default.
        find_key: As in `ModelRegistry.find`.

    Raises:
        InvalidRequest: No version has the label, or no name was given although there are several models.
        NotFound: There is no such model or version.
        Unavailable: The server takes no requests.
    """
    if not server.ready:
        raise Unavailable("the server takes no requests now")
    if not version:
        return models.find(name, find_key=find_key)
    number = to_version(version)
    if number is None:
        return models.find(name, 0, version, find_key)
    if not number:
        raise NotFound(f"there is no version 0 of model {name!r}; versions begin with 1")
    return models.find(name, number)


def _check_repository(name: str) -> None:
    if name:
        raise Unsupported("there is one repository, which has no name: leave repository_name empty")


def _to_policy(request: pb.RepositoryModelLoadRequest) -> VersionPolicy | None:
    """Return the version policy of a request to load a model; None without one."""
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


def _max_difference(model: Model) -> float:
    name = "onnx" if model.precision == "fp32" else f"onnx-{model.precision}"
    variant = model.manifest.certificate.find(name)
    return max((row.max_difference for row in variant.rows), default=0.0) if variant else 0.0


def _describe_proof(proof: Proof | None) -> dict[str, str]:
    """Return what was proved on this machine; nothing with `--prove off`."""
    if proof is None:
        return {}
    return {
        "proof.device": proof.key.device,
        "proof.runtime": proof.key.runtime,
        "proof.images": str(proof.images),
        "proof.accuracy": f"{proof.accuracy:.6f}",
        "proof.max_difference": f"{proof.max_difference:.3g}",
        "proof.seconds": f"{proof.seconds:.3f}",
    }


def _to_statistics(model: Model, counts: Counts) -> pb.ModelStatistics:
    return pb.ModelStatistics(
        name=model.name,
        version=str(model.version),
        last_inference=counts.last_ms,
        inference_count=counts.images,
        execution_count=sum(batch.count for batch in counts.batches.values()),
        inference_stats=pb.InferStatistics(
            success=_to_duration(counts.success),
            fail=_to_duration(counts.fail),
            queue=_to_duration(counts.queue),
            compute_input=_to_duration(counts.decode),
            compute_infer=_to_duration(counts.compute),
            compute_output=_to_duration(counts.respond),
        ),
        batch_stats=[
            pb.InferBatchStatistics(batch_size=size, compute_infer=_to_duration(batch))
            for size, batch in sorted(counts.batches.items())
        ],
    )


def _to_duration(duration: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=duration.count, ns=duration.ns)
