"""What Prometheus reads is what was asked, exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving.client import Client
from serving.config import Batching, Compute, Limits
from serving.errors import InvalidRequest, Unauthenticated
from serving.models import loader, registry
from serving.observability.metrics import make_metrics
from serving.server import Server
from tests.heldout import Heldout


@pytest.fixture
def served(repository: Path) -> registry.ModelRegistry:
    """A model that nobody has asked yet."""
    return registry.ModelRegistry([loader.load(repository / "digits" / "1", Compute(device="cpu", tune=False))])


@pytest.fixture
def metrics(served: registry.ModelRegistry) -> CollectorRegistry:
    """The metrics of it."""
    return make_metrics(served)


def read(metrics: CollectorRegistry) -> dict[tuple[str, str], float]:
    """Return every sample by its name and its last label, as the official parser reads it."""
    families = list(text_string_to_metric_families(generate_latest(metrics).decode()))
    return {
        (sample.name, sample.labels.get("le", sample.labels.get("code", ""))): sample.value
        for family in families
        for sample in family.samples
    }


def test_the_page_agrees_with_what_was_asked(
    served: registry.ModelRegistry, metrics: CollectorRegistry, heldout: Heldout
) -> None:
    """Requests by code, images, and the buckets of every histogram."""
    with Server(served, "127.0.0.1", 0, Limits()) as server, Client(server.address) as client:
        for images in (1, 1, 3, 40):
            client.classify(heldout[0][:images])
        with pytest.raises(InvalidRequest):
            client.classify(heldout[0][:1, :4])
    found = read(metrics)
    assert found["resnet_requests_total", "OK"] == 4
    assert found["resnet_requests_total", "INVALID_ARGUMENT"] == 1
    assert found["resnet_images_total", ""] == 45
    for name in ("resnet_request_seconds", "resnet_queue_seconds", "resnet_compute_seconds"):
        assert found[f"{name}_count", ""] == found[f"{name}_bucket", "+Inf"] == 4
        buckets = [value for (sample, _), value in found.items() if sample == f"{name}_bucket"]
        assert buckets == sorted(buckets)
    assert found["resnet_request_seconds_sum", ""] >= found["resnet_compute_seconds_sum", ""] > 0
    sizes = {bound: found["resnet_batch_images_bucket", bound] for bound in ("1.0", "2.0", "4.0", "32.0", "64.0")}
    assert sizes == {"1.0": 2, "2.0": 2, "4.0": 3, "32.0": 3, "64.0": 4}
    assert found["resnet_batch_images_sum", ""] == 45
    assert found["resnet_queued_images", ""] == found["resnet_queued_work_seconds", ""] == 0
    assert found["resnet_model_info", ""] == found["resnet_build_info", ""] == 1


def test_costs_of_batches_are_on_the_page(repository: Path) -> None:
    """Of the sizes that were measured at load, and how they are computed."""
    model = loader.load(repository / "digits" / "1", Compute(device="cpu"), Batching(max_batch=4))
    text = generate_latest(make_metrics(registry.ModelRegistry([model]))).decode()
    for images in (1, 2, 4):
        ns = model.batcher.curve.ns(images)
        assert f'resnet_batch_cost_seconds{{images="{images}",model="digits",version="1"}} {ns / 1e9}\n' in text
    assert f'plan="{model.plan}"' in text
    assert 'images="8"' not in text


def test_a_refused_version_is_on_the_page(served: registry.ModelRegistry, metrics: CollectorRegistry) -> None:
    """Until a good one takes its place."""
    served.refuse("digits", 2, "its files were changed")
    assert read(metrics)["resnet_refused_info", ""] == 1
    served.retain("digits", [1], {})
    assert ("resnet_refused_info", "") not in read(metrics)


def test_refused_calls_are_on_the_page(served: registry.ModelRegistry) -> None:
    """Those that no model counts."""
    with Server(served, "127.0.0.1", 0, Limits(), token="sesame") as server, Client(server.address) as client:
        with pytest.raises(Unauthenticated):
            client.classify(np.zeros((1, 32, 32, 3), np.uint8))
        assert (
            read(make_metrics(served, refusals=server.refusals))["resnet_refused_calls_total", "UNAUTHENTICATED"] == 1
        )


def test_the_proof_is_on_the_page(served: registry.ModelRegistry, metrics: CollectorRegistry) -> None:
    """With what computes, the number of images, the largest difference and the duration."""
    (model,) = served
    assert model.proof
    text = generate_latest(metrics).decode()
    labels = f'device="{model.proof.key.device}",model="digits",runtime="CPUExecutionProvider",version="1"'
    assert f"resnet_proof_images{{{labels}}} 256.0\n" in text
    found = read(metrics)
    assert 0 < found["resnet_proof_max_difference", ""] == model.proof.max_difference < 1e-5
    assert found["resnet_proof_seconds", ""] == model.proof.seconds > 0
