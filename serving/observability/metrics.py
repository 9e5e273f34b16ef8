"""Metrics for Prometheus, labelled by `model` and `version`; `serving.models.statistics` counts them.

| metric                       | meaning                                                                    |
|------------------------------|----------------------------------------------------------------------------|
| resnet_requests_total        | requests, by gRPC status (`code`)                                          |
| resnet_refused_calls_total   | calls refused before a model was looked up, by `code` alone                |
| resnet_images_total          | images answered                                                            |
| resnet_request_seconds       | histogram: latency of answered requests, from parsing to the response      |
| resnet_queue_seconds         | histogram: time in the queue of answered requests                          |
| resnet_compute_seconds       | histogram: compute time of the batches of answered requests                |
| resnet_batch_images          | histogram: images per batch                                                |
| resnet_queued_images         | images in the queue                                                        |
| resnet_queued_work_seconds   | predicted time until their computation has begun, a figure to scale by     |
| resnet_batch_cost_seconds    | compute time of a batch, by its number of `images`                         |
| resnet_model_info            | 1 for each served version, with `precision`, `provider`, `plan`, `digest`  |
| resnet_certificate_accuracy  | accuracy of the original model on the held-out images, 0 to 1              |
| resnet_proof_images          | images that proved the engine here, with its `device` and `runtime`        |
| resnet_proof_max_difference  | largest difference of a probability from the original in that proof        |
| resnet_proof_seconds         | duration of that proof                                                     |
| resnet_refused_info          | 1 for each version that was refused                                        |
| resnet_default_info          | 1 for the version that answers requests that name none                     |
| resnet_shadow_images_total   | images to compare with `other`, by `source` (shadow, rollout), `result`    |
| resnet_shadow_max_difference | largest difference of a probability from `other`, by `source`              |
| resnet_rollout_percent       | share of the requests that the version of a running rollout answers        |
| resnet_rollout_agreement     | `bound` (low, high) of the share of images with the stable version's class |
| resnet_rollout_info          | 1 for the running or last rollout, with `stable`, `state`, `reason`        |
| resnet_mirror_age_seconds    | seconds since object storage was last read, if the models are from there   |
| resnet_build_info            | 1, with `version`, `onnxruntime` and `transport` in place of the labels    |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import onnxruntime
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from resnet.packages import VERSION
from serving.models.mirror import Mirror
from serving.models.registry import ModelRegistry
from serving.models.statistics import BOUNDS_NS, Counts, Duration
from serving.observability.comparisons import ComparisonsCollector
from serving.rollouts.rollouts import Rollouts
from serving.rollouts.shadows import Shadows
from serving.runtimes.cost import CostCurve

LABELS = ("model", "version")
BATCH_BOUNDS = tuple(2**power for power in range(9))  # 1 to 256 images


def make_metrics(
    models: ModelRegistry,
    transport: str = "",
    refusals: Mapping[str, int] = MappingProxyType({}),
    shadows: Shadows | None = None,
    rollouts: Rollouts | None = None,
    mirror: Mirror | None = None,
) -> CollectorRegistry:
    """Return the metrics, which are collected anew whenever somebody reads them.

    Args:
        models: Models to report on.
        transport: Name of the server's transport, for `resnet_build_info`.
        refusals: Number of calls that the server refused, by the name of their status.
        shadows: The shadows of the server, if it has any.
        rollouts: Its rollouts, likewise.
        mirror: The mirror of its models, if they are in object storage.
    """
    registry = CollectorRegistry()
    registry.register(_ModelsCollector(models, transport, refusals, mirror))
    if shadows and rollouts:
        registry.register(ComparisonsCollector(models, shadows, rollouts))
    return registry


class _ModelsCollector(Collector):
    def __init__(
        self, models: ModelRegistry, transport: str, refusals: Mapping[str, int], mirror: Mirror | None
    ) -> None:
        self._models, self._transport, self._refusals, self._mirror = models, transport, refusals, mirror

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily("resnet_requests", "Requests by gRPC status", labels=(*LABELS, "code"))
        images = CounterMetricFamily("resnet_images", "Images answered", labels=LABELS)
        latency = HistogramMetricFamily("resnet_request_seconds", "Latency of answered requests", labels=LABELS)
        queue = HistogramMetricFamily("resnet_queue_seconds", "Time in the queue", labels=LABELS)
        compute = HistogramMetricFamily("resnet_compute_seconds", "Compute time of the batch", labels=LABELS)
        batches = HistogramMetricFamily("resnet_batch_images", "Images per batch", labels=LABELS)
        queued = GaugeMetricFamily("resnet_queued_images", "Images in the queue", labels=LABELS)
        work = GaugeMetricFamily("resnet_queued_work_seconds", "Predicted time in the queue", labels=LABELS)
        costs = GaugeMetricFamily(
            "resnet_batch_cost_seconds", "Compute time of a batch by size", labels=(*LABELS, "images")
        )
        accuracy = GaugeMetricFamily("resnet_certificate_accuracy", "Accuracy of the original model", labels=LABELS)
        proved = GaugeMetricFamily(
            "resnet_proof_images", "Images that proved the engine", labels=(*LABELS, "device", "runtime")
        )
        difference = GaugeMetricFamily("resnet_proof_max_difference", "Largest difference in the proof", labels=LABELS)
        seconds = GaugeMetricFamily("resnet_proof_seconds", "Duration of the proof", labels=LABELS)
        info = GaugeMetricFamily(
            "resnet_model_info", "Served versions", labels=(*LABELS, "precision", "provider", "plan", "digest")
        )
        all_counts = self._models.counts()
        for model in self._models:
            names, counts = [model.name, str(model.version)], all_counts.get((model.name, model.version), Counts())
            for code, count in counts.codes.items():
                requests.add_metric([*names, code], count)
            images.add_metric(names, counts.images)
            for family, duration in ((latency, counts.success), (queue, counts.queue), (compute, counts.compute)):
                family.add_metric(names, list(_duration_buckets(duration)), duration.ns / 1e9)
            sizes = {size: batch.count for size, batch in counts.batches.items()}
            batches.add_metric(names, list(_size_buckets(sizes)), sum(size * count for size, count in sizes.items()))
            queued.add_metric(names, model.batcher.queued)
            work.add_metric(names, model.batcher.queue_ns / 1e9)
            for size, ns in _sample_costs(model.batcher.curve):
                costs.add_metric([*names, str(size)], ns / 1e9)
            accuracy.add_metric(names, model.manifest.certificate.accuracy)
            if model.proof is not None:
                proved.add_metric([*names, model.proof.key.device, model.proof.key.runtime], model.proof.images)
                difference.add_metric(names, model.proof.max_difference)
                seconds.add_metric(names, model.proof.seconds)
            info.add_metric([*names, model.precision, model.engine.provider, model.plan, model.manifest.digest], 1)
        calls = CounterMetricFamily(
            "resnet_refused_calls", "Calls refused before a model was looked up", labels=("code",)
        )
        for code, count in dict(self._refusals).items():
            calls.add_metric([code], count)
        refused = GaugeMetricFamily("resnet_refused_info", "Refused versions", labels=LABELS)
        default = GaugeMetricFamily("resnet_default_info", "Versions for requests that name none", labels=LABELS)
        for name in self._models.names():
            served = self._models.get(name)
            for number in served.refusals:
                refused.add_metric([name, str(number)], 1)
            if served.versions:
                default.add_metric([name, str(served.default)], 1)
        age = GaugeMetricFamily("resnet_mirror_age_seconds", "Time since object storage was last read")
        if self._mirror:
            age.add_metric([], self._mirror.age)
        build = GaugeMetricFamily(
            "resnet_build_info", "Build of this server", labels=("version", "onnxruntime", "transport")
        )
        build.add_metric([VERSION, onnxruntime.__version__, self._transport], 1)
        return (
            requests,
            calls,
            images,
            latency,
            queue,
            compute,
            batches,
            queued,
            work,
            costs,
            accuracy,
            proved,
            difference,
            seconds,
            info,
            refused,
            default,
            age,
            build,
        )


def _duration_buckets(duration: Duration) -> Iterator[tuple[str, int]]:
    """Yield the upper bound in seconds and the cumulative count of each bucket."""
    below = 0
    for bound, count in zip((*BOUNDS_NS, None), duration.buckets, strict=True):
        below += count
        yield ("+Inf" if bound is None else repr(bound / 1e9)), below


def _sample_costs(curve: CostCurve) -> Iterator[tuple[int, float]]:
    """Yield images and nanoseconds for a few batch sizes, as a curve may have hundreds; none beyond the largest."""
    largest = max(curve.points(), default=0)
    for size in BATCH_BOUNDS:
        if size <= largest:
            yield size, curve.ns(size)


def _size_buckets(counts: dict[int, int]) -> Iterator[tuple[str, int]]:
    """Yield the upper bound in images and the cumulative count of each bucket."""
    for bound in BATCH_BOUNDS:
        yield repr(float(bound)), sum(count for size, count in counts.items() if size <= bound)
    yield "+Inf", sum(counts.values())
