"""Traces for OpenTelemetry: a span for each call, part of the caller's trace, with what became of its images.

Where spans go, which are kept and what the service is called say the standard variables: OTEL_EXPORTER_OTLP_ENDPOINT,
OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME and their like. Importing this module needs the extra `tracing`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from resnet import BadInput
from serving.errors import Cancelled, InternalError, ServingError
from serving.models.model import Model
from serving.models.statistics import TrackedRequest
from serving.transports.call import Call, Methods, Streaming, Unary

try:
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    from opentelemetry.util.types import AttributeValue
except ModuleNotFoundError as error:
    raise BadInput(f"{error.name} is not installed; to trace calls, install resnet with its extra 'tracing'") from None

QUIET = "/grpc."  # health checks and reflection: nobody wants a trace of each probe


class Tracing:
    """Traces calls from when it is made until `close`."""

    def __init__(self) -> None:
        """Send spans in batches, from a thread of its own."""
        name = Resource.create({"service.name": "resnet"}).merge(OTELResourceDetector().detect())  # variables win
        self.provider = TracerProvider(resource=name)
        self.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self.provider.get_tracer("resnet")

    def follow_calls(self, methods: Methods) -> Methods:
        """Return methods whose calls are spans, each part of its caller's trace."""
        return {path: method if path.startswith(QUIET) else self._follow(method) for path, method in methods.items()}

    def follow(self, model: Model) -> None:
        """Add to the span of each call what the model does for it."""
        model.statistics.observer = _ModelObserver(self._tracer, model)

    def close(self) -> None:
        """Send what is left."""
        self.provider.shutdown()

    def _follow(self, method: Unary | Streaming) -> Unary | Streaming:
        if isinstance(method, Unary):
            unary = method.answer

            def answer(call: Call) -> None:
                self._begin(call)
                unary(call)

            return method._replace(answer=answer)
        streaming = method.answer

        def converse(call: Call, messages: Iterator[bytes]) -> Iterator[bytes]:
            self._begin(call)
            error: ServingError | None = None
            try:
                yield from streaming(call, messages)
            except GeneratorExit:
                error = Cancelled("the caller went away")
                raise
            except Exception as raised:
                error = raised if isinstance(raised, ServingError) else InternalError("the server failed")
                raise
            finally:
                _end(call.span, error)

        return method._replace(answer=converse)

    def _begin(self, call: Call) -> None:
        """Give a call its span."""
        carrier = {key: value for key, value in call.metadata if isinstance(value, str)}
        span = self._tracer.start_span(
            call.method,
            TraceContextTextMapPropagator().extract(carrier),
            kind=trace.SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.method": call.name, "client.address": call.peer},
        )
        call.span, call.trace_id = span, trace.format_trace_id(span.get_span_context().trace_id)
        call.ended = partial(_end, span)


class _ModelObserver:
    """Describes requests for one model, in the span of the call that they came with."""

    def __init__(self, tracer: trace.Tracer, model: Model) -> None:
        self._tracer = tracer
        self._known: dict[str, AttributeValue] = {
            "resnet.model": model.name,
            "resnet.version": model.version,
            "resnet.precision": model.precision,
        }

    def end(self, request: TrackedRequest) -> None:
        """Set the attributes of the span, of the latest request if there are many, and add a child for each phase."""
        span = request.span
        if span is None or not span.is_recording():
            return
        attributes = self._known.copy()
        phases = [("decode", request.decode_ns)] if request.decode_ns else []
        if answer := request.answer:
            attributes |= {"resnet.images": len(answer.probabilities), "resnet.batch_size": answer.batch_size}
            phases += [("queue", answer.queue_ns), ("compute", answer.compute_ns)]
        span.set_attributes(attributes)
        at = time.time_ns() - request.elapsed_ns()
        for name, ns in phases:
            child = self._tracer.start_span(name, trace.set_span_in_context(span), attributes=attributes, start_time=at)
            at += ns
            child.end(at)


def _end(span: trace.Span, error: ServingError | None) -> None:
    """End the span of a call, with its status."""
    span.set_attribute("rpc.grpc.status_code", error.status.code if error else 0)
    if error:
        span.set_status(trace.Status(trace.StatusCode.ERROR, f"{error.status.name}: {error}"))
    span.end()
