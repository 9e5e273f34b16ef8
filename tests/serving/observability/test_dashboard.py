"""Grafana's dashboard asks for what the server's page has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import generate_latest

from serving.client import Client
from serving.config import Compute, Limits
from serving.models import loader, registry
from serving.models.mirror import Mirror
from serving.models.watcher import Watcher
from serving.observability.metrics import make_metrics
from serving.rollouts.record import RolloutSettings
from serving.rollouts.rollouts import Rollouts
from serving.rollouts.shadows import Shadows
from serving.server import Server
from tests.versions import SIDE, write_version

METRIC = re.compile(r"\bresnet_\w+")


@pytest.fixture
def dashboard() -> dict[str, Any]:
    """As it ships, in the package."""
    content: dict[str, Any] = json.loads(
        resources.files("serving.observability").joinpath("dashboard.json").read_text()
    )
    return content


@pytest.fixture
def page(tmp_path: Path) -> Iterator[str]:
    """What Prometheus reads of a server that has answered and refused, and that rolls a version out."""
    for number in (1, 2):
        write_version(tmp_path / "models" / "colors" / str(number))
    served = registry.ModelRegistry()
    watcher = Watcher(tmp_path / "models", served, partial(loader.load, compute=Compute(device="cpu")))
    (tmp_path / "models" / "colors" / "stable").symlink_to("1")
    watcher.start()
    shadows = Shadows(served, watcher, lambda: True)
    rollouts = Rollouts(served, watcher, lambda: True)
    rollouts.roll_out("colors", 2, RolloutSettings())
    served.refuse("colors", 3, "its files were changed")
    with Server(served, "127.0.0.1", 0, Limits()) as server, Client(server.address) as client:
        client.classify(np.zeros((1, SIDE, SIDE, 3), np.uint8))
    metrics = make_metrics(
        served,
        refusals={"RESOURCE_EXHAUSTED": 1},
        shadows=shadows,
        rollouts=rollouts,
        mirror=Mirror("memory://bucket/models"),
    )
    yield generate_latest(metrics).decode()
    rollouts.close()


def test_every_metric_that_is_asked_for_is_on_the_page(dashboard: dict[str, Any], page: str) -> None:
    """And every one that the page has is asked for."""
    exposed = set(METRIC.findall("\n".join(line for line in page.splitlines() if not line.startswith("#"))))
    asked = set(METRIC.findall(" ".join(expressions(dashboard))))
    assert asked <= exposed
    names = {re.sub("_(bucket|sum|count)$", "", name) for name in exposed}
    assert names == {re.sub("_(bucket|sum|count)$", "", name) for name in asked}


def test_every_label_that_is_asked_for_is_on_the_page(dashboard: dict[str, Any], page: str) -> None:
    """In selectors, groupings and legends."""
    exposed = set(re.findall(r"[{,](\w+)=\"", page))
    text = " ".join(expressions(dashboard))
    asked = set(re.findall(r"[{,](\w+)=~?\"", text))
    asked |= {label.strip() for group in re.findall(r"by \(([^)]*)\)", text) for label in group.split(",")}
    asked |= {label for panel in dashboard["panels"] for label in re.findall(r"{{(\w+)}}", json.dumps(panel))}
    assert asked <= exposed


def test_panels_have_their_own_place_and_number(dashboard: dict[str, Any]) -> None:
    """Grafana would move what overlaps."""
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in panels)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def expressions(dashboard: dict[str, Any]) -> list[str]:
    """Return all that is asked of Prometheus."""
    queries = [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    targets = [target for panel in dashboard["panels"] if panel["type"] != "row" for target in panel["targets"]]
    return [target["expr"] for target in targets] + [query["query"] for query in queries]
