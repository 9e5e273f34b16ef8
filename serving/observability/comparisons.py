"""Metrics of shadows and rollouts; the table in `serving.observability.metrics` explains them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.models.registry import ModelRegistry
from serving.rollouts.guard import PASSES, wilson
from serving.rollouts.rollouts import WORST, Rollouts
from serving.rollouts.shadow import Shadow
from serving.rollouts.shadows import Shadows

LABELS = ("model", "version")
OTHERS = ("model", "other", "source")  # the source is a shadow or a rollout


class ComparisonsCollector(Collector):
    """Collects what shadows and rollouts count."""

    def __init__(self, models: ModelRegistry, shadows: Shadows, rollouts: Rollouts) -> None:
        """Collect for these models."""
        self._models, self._shadows, self._rollouts = models, shadows, rollouts

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        images = CounterMetricFamily("resnet_shadow_images", "Images to compare", labels=(*OTHERS, "result"))
        difference = GaugeMetricFamily(
            "resnet_shadow_max_difference", "Largest difference of a probability", labels=OTHERS
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
                _add_shadow(images, difference, [name, opened.settings.other, "shadow"], opened.shadow)
            if not (status := self._rollouts.find(name)):
                continue
            record, labels = status.record, [name, str(status.record.version)]
            reason = record.reason.partition(WORST)[0]  # ids of requests are no labels
            info.add_metric([*labels, str(record.stable), record.state, reason], 1)
            if record.state == "running":
                percent.add_metric(labels, record.percent)
            if status.shadow:
                _add_shadow(images, difference, [name, str(record.version), "rollout"], status.shadow)
                counts = status.shadow.agreement.counts()
                for bound, value in wilson(counts.all_same, counts.all_images, PASSES)._asdict().items():
                    agreement.add_metric([*labels, bound], value)
        return images, difference, percent, agreement, info


def _add_shadow(
    images: CounterMetricFamily, difference: GaugeMetricFamily, labels: Sequence[str], shadow: Shadow
) -> None:
    compared, counts = shadow.agreement.counts(), shadow.counts()
    results = {
        "same": compared.all_same,
        "different": compared.all_images - compared.all_same,
        "dropped": counts.dropped,
        "failed": counts.failed,
    }
    for result, value in results.items():
        images.add_metric([*labels, result], value)
    difference.add_metric(labels, compared.max_difference)
