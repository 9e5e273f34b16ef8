"""Traces for OpenTelemetry: a span for each call, part of the caller's trace, with what became of its images.

Where spans go, which are kept and what the service is called say the standard variables: OTEL_EXPORTER_OTLP_ENDPOINT,
OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME and their like. Importing this module needs the extra `tracing`.
"""

from __future__ import annotations

import logging
import time

import grpc

from resnet import BadInput
from serving import calls
from serving.models import Model
from serving.statistics import Request

try:
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.grpc import server_interceptor
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
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
        self.interceptor: grpc.ServerInterceptor = server_interceptor(  # type: ignore[no-untyped-call]
            self.provider, filter_=lambda details: not details.method.startswith(QUIET)
        )
        calls.log.addFilter(_name_trace)

    def follow(self, model: Model) -> None:
        """Add to the span of each call what the model does for it."""
        model.statistics.observer = _ModelObserver(self._tracer, model)

    def close(self) -> None:
        """Send what is left."""
        calls.log.removeFilter(_name_trace)
        self.provider.shutdown()


class _ModelObserver:
    """Describes requests for one model, in the span of the call that they came with."""

    def __init__(self, tracer: trace.Tracer, model: Model) -> None:
        self._tracer = tracer
        self._known: dict[str, AttributeValue] = {
            "resnet.model": model.name,
            "resnet.version": model.version,
            "resnet.precision": model.precision,
        }

    def begin(self, request: Request) -> None:
        """Remember the call."""
        request.span = trace.get_current_span()

    def end(self, request: Request) -> None:
        """Set the attributes of the span, of the latest request if there are many, and add a child for each phase."""
        span = request.span
        if not span.is_recording():
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


def _name_trace(record: logging.LogRecord) -> bool:
    """Add to what is logged of a call the id of its trace."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        record.__dict__["fields"]["trace_id"] = trace.format_trace_id(context.trace_id)
    return True
