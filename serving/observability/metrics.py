"""The page that Prometheus reads, by `model` and `version`.

The figures are those of `serving.models.statistics`.

| metric                      | what it is                                                           |
|-----------------------------|----------------------------------------------------------------------|
| resnet_requests_total       | requests, by gRPC status (`code`)                                    |
| resnet_images_total         | images answered                                                      |
| resnet_request_seconds      | histogram: answered requests, from unpacking to packing              |
| resnet_queue_seconds        | histogram: of these, the wait for the engine                         |
| resnet_compute_seconds      | histogram: of these, the batch they were in                          |
| resnet_batch_images         | histogram: images of each call of the engine                         |
| resnet_queued_images        | images that wait now                                                 |
| resnet_batch_cost_seconds   | what a batch takes, by its number of `images`                        |
| resnet_model_info           | 1 for what is served, with `precision`, `provider`, `plan`, `digest` |
| resnet_certificate_accuracy | share of the held-out images that the original has right             |
| resnet_refused_info         | 1 for each version that was refused                                  |
| resnet_build_info           | 1, with `version`, `onnxruntime` and `transport`, and no other label |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import version
from threading import Thread
from typing import Self
from wsgiref.simple_server import WSGIServer

import onnxruntime
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from resnet import BadInput
from serving.models.registry import ModelRegistry
from serving.models.statistics import BOUNDS_NS, Counts, Duration
from serving.runtimes.cost import CostCurve

LABELS = ("model", "version")
BATCH_BOUNDS = tuple(2**power for power in range(9))  # 1 to 256 images


class MetricsServer:
    """Answers GET /metrics from when it is made until `close`; as a context manager, until the end of the block."""

    def __init__(self, models: ModelRegistry, host: str, port: int, transport: str = "") -> None:
        """Listen on a port.

        Args:
            models: What is served.
            host: Name or address of an interface.
            port: 0 takes a free one; see the attribute `address`.
            transport: What receives calls, for people.

        Raises:
            BadInput: The port cannot be had.
        """
        registry = CollectorRegistry()
        registry.register(_ModelsCollector(models, transport))
        self._server: WSGIServer
        self._thread: Thread
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise BadInput(
                f"{host}:{port} cannot be listened on ({error.strerror}); choose another with --metrics-port"
            ) from None
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Listen no longer."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _ModelsCollector(Collector):
    def __init__(self, models: ModelRegistry, transport: str) -> None:
        self._models, self._transport = models, transport

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily("resnet_requests", "Requests, by gRPC status", labels=(*LABELS, "code"))
        images = CounterMetricFamily("resnet_images", "Images answered", labels=LABELS)
        total = HistogramMetricFamily("resnet_request_seconds", "Answered requests", labels=LABELS)
        queue = HistogramMetricFamily("resnet_queue_seconds", "Waits for the engine", labels=LABELS)
        compute = HistogramMetricFamily("resnet_compute_seconds", "Batches that requests were in", labels=LABELS)
        batches = HistogramMetricFamily("resnet_batch_images", "Images of each call of the engine", labels=LABELS)
        queued = GaugeMetricFamily("resnet_queued_images", "Images that wait now", labels=LABELS)
        costs = GaugeMetricFamily("resnet_batch_cost_seconds", "What a batch takes", labels=(*LABELS, "images"))
        accuracy = GaugeMetricFamily("resnet_certificate_accuracy", "Accuracy of the original", labels=LABELS)
        about = GaugeMetricFamily(
            "resnet_model_info", "Models that are served", labels=(*LABELS, "precision", "provider", "plan", "digest")
        )
        counted = self._models.counts()
        for model in self._models:
            names, found = [model.name, str(model.version)], counted.get((model.name, model.version), Counts())
            for code, count in found.codes.items():
                requests.add_metric([*names, code], count)
            images.add_metric(names, found.images)
            for family, duration in ((total, found.success), (queue, found.queue), (compute, found.compute)):
                family.add_metric(names, list(_seconds(duration)), duration.ns / 1e9)
            sizes = {size: batch.count for size, batch in found.batches.items()}
            batches.add_metric(names, list(_sizes(sizes)), sum(size * count for size, count in sizes.items()))
            queued.add_metric(names, model.batcher.queued)
            for size, ns in _costs(model.batcher.curve):
                costs.add_metric([*names, str(size)], ns / 1e9)
            accuracy.add_metric(names, model.manifest.certificate.accuracy)
            about.add_metric([*names, model.precision, model.engine.provider, model.plan, model.manifest.digest], 1)
        refused = GaugeMetricFamily("resnet_refused_info", "Versions that were refused", labels=LABELS)
        for name in self._models.names():
            for number in self._models.get(name).refusals:
                refused.add_metric([name, str(number)], 1)
        build = GaugeMetricFamily("resnet_build_info", "This server", labels=("version", "onnxruntime", "transport"))
        build.add_metric([version("resnet"), onnxruntime.__version__, self._transport], 1)
        return (requests, images, total, queue, compute, batches, queued, costs, accuracy, about, refused, build)


def _seconds(duration: Duration) -> Iterator[tuple[str, int]]:
    """Yield the buckets of a histogram, each with all that is below its bound."""
    below = 0
    for bound, count in zip((*BOUNDS_NS, None), duration.buckets, strict=True):
        below += count
        yield ("+Inf" if bound is None else repr(bound / 1e9)), below


def _costs(curve: CostCurve) -> Iterator[tuple[int, float]]:
    """Yield nanoseconds by images, up to the largest batch that is known: a few points of what may be hundreds."""
    largest = max(curve.points(), default=0)
    for size in BATCH_BOUNDS:
        if size <= largest:
            yield size, curve.ns(size)


def _sizes(counts: dict[int, int]) -> Iterator[tuple[str, int]]:
    for bound in BATCH_BOUNDS:
        yield repr(float(bound)), sum(count for size, count in counts.items() if size <= bound)
    yield "+Inf", sum(counts.values())
