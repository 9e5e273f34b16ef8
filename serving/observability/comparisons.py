"""Metrics of shadows and rollouts; the table in `serving.observability.metrics` explains them."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.models.registry import ModelRegistry
from serving.rollouts.guard import PASSES, wilson
from serving.rollouts.rollouts import Rollouts
from serving.rollouts.shadow import Shadow
from serving.rollouts.shadows import Shadows

LABELS = ("model", "version")


class ComparisonsCollector(Collector):
    """Collects what shadows and rollouts count."""

    def __init__(self, models: ModelRegistry, shadows: Shadows, rollouts: Rollouts) -> None:
        """Collect for these models."""
        self._models, self._shadows, self._rollouts = models, shadows, rollouts

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        images = CounterMetricFamily("resnet_shadow_images", "Images to compare", labels=("model", "other", "result"))
        difference = GaugeMetricFamily(
            "resnet_shadow_max_difference", "Largest difference of a probability", labels=("model", "other")
        )
        percent = GaugeMetricFamily("resnet_rollout_percent", "Share of the requests", labels=LABELS)
        agreement = GaugeMetricFamily(
            "resnet_rollout_agreement", "Share of images with the same class", labels=(*LABELS, "bound")
        )
        info = GaugeMetricFamily(
            "resnet_rollout_info", "Running and last rollouts", labels=(*LABELS, "stable", "state", "reason")
        )
        for name in self._models.names():
            if opened := self._shadows.find(name):
                _add_shadow(images, difference, name, opened.settings.other, opened.shadow)
            if not (status := self._rollouts.find(name)):
                continue
            record, labels = status.record, [name, str(status.record.version)]
            info.add_metric([*labels, str(record.stable), record.state, record.reason], 1)
            if record.state == "running":
                percent.add_metric(labels, record.percent)
            if status.shadow:
                _add_shadow(images, difference, name, str(record.version), status.shadow)
                counts = status.shadow.agreement.counts()
                for bound, value in wilson(int(counts.same.sum()), int(counts.images.sum()), PASSES)._asdict().items():
                    agreement.add_metric([*labels, bound], value)
        return images, difference, percent, agreement, info


def _add_shadow(images: Metric, difference: Metric, name: str, other: str, shadow: Shadow) -> None:
    compared, counts = shadow.agreement.counts(), shadow.counts()
    same = int(compared.same.sum())
    results = {
        "same": same,
        "different": int(compared.images.sum()) - same,
        "dropped": counts.dropped,
        "failed": counts.failed,
    }
    for result, value in results.items():
        images.add_sample("resnet_shadow_images_total", {"model": name, "other": other, "result": result}, value)
    difference.add_sample("resnet_shadow_max_difference", {"model": name, "other": other}, compared.max_difference)
