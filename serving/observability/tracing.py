"""OpenTelemetry traces: one span for each call, as part of the caller's trace, with a child span for each phase.

The standard variables configure the exporter, the sampler and the service name: OTEL_EXPORTER_OTLP_ENDPOINT,
OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME and so on. This module needs the extra `tracing`.
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
    raise BadInput(f"{error.name} is not installed; for --trace, install resnet with its extra 'tracing'") from None

UNTRACED = "/grpc."  # health checks and reflection: a span for each probe would be noise


class Tracing:
    """Traces calls until `close`."""

    def __init__(self) -> None:
        """Start a thread that exports spans in batches."""
        resource = Resource.create({"service.name": "resnet"}).merge(OTELResourceDetector().detect())  # variables win
        self.provider = TracerProvider(resource=resource)
        self.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self.provider.get_tracer("resnet")

    def follow_calls(self, methods: Methods) -> Methods:
        """Return methods that record a span for each call, as part of its caller's trace."""
        return {
            path: method if path.startswith(UNTRACED) else self._trace_method(method)
            for path, method in methods.items()
        }

    def follow(self, model: Model) -> None:
        """Add the model's attributes and phases to the span of each call."""
        model.statistics.observers += (_ModelObserver(self._tracer, model),)

    def close(self) -> None:
        """Export the remaining spans."""
        self.provider.shutdown()

    def _trace_method(self, method: Unary | Streaming) -> Unary | Streaming:
        if isinstance(method, Unary):
            unary = method.answer

            def traced_unary(call: Call) -> None:
                self._start_span(call)
                unary(call)

            return method._replace(answer=traced_unary)
        streaming = method.answer

        def traced_streaming(call: Call, messages: Iterator[bytes]) -> Iterator[bytes]:
            self._start_span(call)
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
                _end_span(call.span, error)

        return method._replace(answer=traced_streaming)

    def _start_span(self, call: Call) -> None:
        """Start the span of a call."""
        carrier = {key: value for key, value in call.metadata if isinstance(value, str)}
        span = self._tracer.start_span(
            call.method,
            TraceContextTextMapPropagator().extract(carrier),
            kind=trace.SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.method": call.name, "client.address": call.peer},
        )
        call.span, call.trace_id = span, trace.format_trace_id(span.get_span_context().trace_id)
        call.ended = partial(_end_span, span)


class _ModelObserver:
    """Records the requests for one model in the spans of their calls."""

    def __init__(self, tracer: trace.Tracer, model: Model) -> None:
        self._tracer = tracer
        self._model_attributes: dict[str, AttributeValue] = {
            "resnet.model": model.name,
            "resnet.version": model.version,
            "resnet.precision": model.precision,
        }

    def end(self, request: TrackedRequest) -> None:
        """Add a child span for each phase; the attributes on the call's own span are those of its latest request."""
        span = request.span
        if span is None or not span.is_recording():
            return
        attributes = self._model_attributes.copy()
        phases = [("decode", request.decode_ns)] if request.decode_ns else []
        if answer := request.answer:
            attributes |= {"resnet.images": len(answer.probabilities), "resnet.batch_size": answer.batch_size}
            phases += [("queue", answer.queue_ns), ("compute", answer.compute_ns)]
        span.set_attributes(attributes)
        start = time.time_ns() - request.elapsed_ns()
        for name, ns in phases:
            child = self._tracer.start_span(
                name, trace.set_span_in_context(span), attributes=attributes, start_time=start
            )
            start += ns
            child.end(start)


def _end_span(span: trace.Span, error: ServingError | None) -> None:
    """Set the status of a call's span, and end it."""
    span.set_attribute("rpc.grpc.status_code", error.status.code if error else 0)
    if error:
        span.set_status(trace.Status(trace.StatusCode.ERROR, f"{error.status.name}: {error}"))
    span.end()
