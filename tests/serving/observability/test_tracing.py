"""A call as its caller's collector sees it: a real receiver of OpenTelemetry's protocol."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from protos import classifier_pb2 as pb
from protos import inference_pb2
from protos.classifier_pb2_grpc import ClassifierStub
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from resnet import cli
from serving.config import Compute, Limits
from serving.errors import InvalidRequest
from serving.logs import JsonFormatter
from serving.models import loader, registry
from serving.observability.tracing import Tracing
from serving.runtimes.base import Images
from serving.server import Server
from tests.serving.http.site import ask, open_http
from tests.serving.test_app import SERVE

IMAGES: Images = np.zeros((3, 32, 32, 3), np.uint8)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = [("traceparent", f"00-{TRACE}-{PARENT}-01")]
TENSOR = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=IMAGES.shape, data=IMAGES.tobytes())


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.service = ""
        self.server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self.server)
        self.address = f"http://127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def Export(
        self,
        request: trace_service_pb2.ExportTraceServiceRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Keep them."""
        for resource in request.resource_spans:
            names = {item.key: item.value.string_value for item in resource.resource.attributes}
            self.service = names["service.name"]
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def children(self, span: Span) -> dict[str, Span]:
        """Return those of a span, in the order of their beginnings."""
        found = [child for child in self.spans if child.parent_span_id == span.span_id]
        return {child.name: child for child in sorted(found, key=lambda child: child.start_time_unix_nano)}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Where the standard variables send traces."""
    receiver = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.address)
    yield receiver
    receiver.server.stop(None)


@pytest.fixture
def traced(collector: Collector, repository: Path) -> Iterator[tuple[Tracing, str]]:  # noqa: ARG001  # listens first
    """A server that is traced, and its address."""
    tracing = Tracing()
    model = loader.load(repository / "digits" / "1", Compute(device="cpu", tune=False))
    tracing.follow(model)
    with Server(registry.ModelRegistry([model]), "127.0.0.1", 0, Limits(), tracing=tracing) as server:
        yield tracing, server.address
    tracing.close()


def attributes(span: Span) -> Mapping[str, Any]:
    """Return a span's attributes as plain values."""
    return {item.key: getattr(item.value, str(item.value.WhichOneof("value"))) for item in span.attributes}


def test_a_call_is_a_span_of_its_callers_trace(traced: tuple[Tracing, str], collector: Collector) -> None:
    """With what became of its images, and a child for each phase, one after the other."""
    tracing, address = traced
    with grpc.insecure_channel(address) as channel:
        answer = ClassifierStub(channel).Classify(pb.ClassifyRequest(tensor=TENSOR), metadata=CALLER)
    tracing.close()
    (span,) = [span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == "/resnet.v1.Classifier/Classify"
    ours = {
        "resnet.model": "digits",
        "resnet.version": 1,
        "resnet.precision": "fp32",
        "resnet.images": 3,
        "resnet.batch_size": 3,
    }
    assert attributes(span).items() >= (ours | {"rpc.system": "grpc", "rpc.grpc.status_code": 0}).items()
    phases = collector.children(span)
    assert list(phases) == ["decode", "queue", "compute"]
    took = {name: phase.end_time_unix_nano - phase.start_time_unix_nano for name, phase in phases.items()}
    timing = answer.timing
    assert took == {"decode": timing.decode_ns, "queue": timing.queue_ns, "compute": timing.compute_ns}
    assert all(attributes(phase) == ours and phase.trace_id == span.trace_id for phase in phases.values())
    assert phases["decode"].end_time_unix_nano == phases["queue"].start_time_unix_nano
    assert span.start_time_unix_nano <= phases["decode"].start_time_unix_nano
    assert phases["compute"].end_time_unix_nano <= span.end_time_unix_nano
    assert collector.service == "resnet"


def test_a_call_over_http_is_a_span_too(collector: Collector, repository: Path) -> None:
    """Of its caller's trace, by the name of the gRPC method that it stands for."""
    tracing = Tracing()
    model = loader.load(repository / "digits" / "1", Compute(device="cpu", tune=False))
    tracing.follow(model)
    with (
        Server(registry.ModelRegistry([model]), "127.0.0.1", 0, Limits(), tracing=tracing) as server,
        open_http(server) as http,
    ):
        assert (
            ask(http.address, "/v1/models/digits:predict", {"instances": IMAGES.tolist()}, headers=dict(CALLER)).status
            == 200
        )
        tracing.close()
    (span,) = [span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == "/tensorflow.serving.PredictionService/Predict"
    assert list(collector.children(span)) == ["decode", "queue", "compute"]


def test_a_refused_call_is_a_span_whose_trace_is_in_the_log(
    traced: tuple[Tracing, str], collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    """Its status is the call's; there is nothing of phases that it did not reach."""
    caplog.set_level(logging.INFO, "serving.transports.call")
    tracing, address = traced
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
        ClassifierStub(channel).Classify(pb.ClassifyRequest(model="digits"), metadata=CALLER)
    tracing.close()
    (span,) = collector.spans
    assert attributes(span)["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert attributes(span)["resnet.model"] == "digits"
    assert span.status.code != Status.STATUS_CODE_OK
    (record,) = [record for record in caplog.records if record.name == "serving.transports.call"]
    assert json.loads(JsonFormatter().format(record))["trace_id"] == TRACE


def test_each_request_of_a_stream_adds_its_phases(traced: tuple[Tracing, str], collector: Collector) -> None:
    """To the one span of the call."""
    tracing, address = traced
    tensor = inference_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=IMAGES.shape)
    request = inference_pb2.ModelInferRequest(
        model_name="digits", inputs=[tensor], raw_input_contents=[IMAGES.tobytes()]
    )
    with grpc.insecure_channel(address) as channel:
        assert len(list(GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request] * 2)))) == 2
    tracing.close()
    (span,) = [span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]
    children = [child.name for child in collector.spans if child.parent_span_id == span.span_id]
    assert sorted(children) == ["compute", "compute", "decode", "decode", "queue", "queue"]


def test_phases_belong_to_the_call_that_they_began_with(collector: Collector, repository: Path) -> None:
    """Whichever they end within."""
    tracing = Tracing()
    model = loader.load(repository / "digits" / "1", Compute(device="cpu", tune=False))
    tracing.follow(model)
    tracer = tracing.provider.get_tracer("test")
    with tracer.start_as_current_span("first") as first:
        request = model.statistics.begin(first)
        request.decoded(np.zeros((1, 1, 1, 3), np.uint8))
        with tracer.start_as_current_span("second"):
            request.fail(InvalidRequest("for a reason"))
    tracing.close()
    (phase,) = [span for span in collector.spans if span.name == "decode"]
    assert phase.parent_span_id == first.get_span_context().span_id.to_bytes(8, "big")


def test_probes_and_unsampled_calls_are_no_spans(traced: tuple[Tracing, str], collector: Collector) -> None:
    """The caller's decision holds, as the standard has it."""
    tracing, address = traced
    with grpc.insecure_channel(address) as channel:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        unsampled = [("traceparent", f"00-{TRACE}-{PARENT}-00")]
        assert ClassifierStub(channel).Classify(pb.ClassifyRequest(tensor=TENSOR), metadata=unsampled).version == 1
    tracing.close()
    assert not collector.spans


def test_a_missing_extra_is_named(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence."""
    monkeypatch.delitem(sys.modules, "serving.observability.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert cli.main(["serve", str(repository), "--port=0", "--trace"]) == 2
    assert "install resnet with its extra 'tracing'" in capsys.readouterr().err


def test_a_server_that_does_not_trace_loads_nothing_for_it() -> None:
    """Neither time nor memory."""
    code = (
        "import sys, serving.app, serving.server, serving.observability.metrics; print('opentelemetry' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.slow
def test_the_command_sends_what_is_left_when_it_ends(
    repository: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans wait for their batch; none is lost at SIGTERM. The service is called as the standard variables say."""
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=cats")
    command = [*SERVE, str(repository), "--port=0", "--trace"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    address = process.stdout.readline().removeprefix("serving on ").strip()
    with grpc.insecure_channel(address) as channel:
        ClassifierStub(channel).Classify(pb.ClassifyRequest(tensor=TENSOR))
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert sorted(span.name for span in collector.spans) == [
        "/resnet.v1.Classifier/Classify",
        "compute",
        "decode",
        "queue",
    ]
    assert collector.service == "cats"
