"""The registry, without a server: what it finds while versions come and go."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable

import msgspec
import pytest

from export import manifest
from serving.errors import InvalidRequest, NotFound, ServingError, Unavailable
from serving.models.model import Model
from serving.models.registry import ModelRegistry, ServedVersions
from serving.models.split import TrafficSplit
from serving.models.statistics import Statistics, TrackedRequest
from serving.scheduling.batcher import Batcher
from tests.serving.scheduling.bench import GatedEngine, images
from tests.serving.waiting import submit
from tests.versions import write_version


class RecordedBatcher(Batcher):
    """Notes for how long it is waited for, and lets the clock of the test go on."""

    def __init__(self, clock: list[float], waits: list[float]) -> None:
        super().__init__(GatedEngine().run)
        self._clock, self._waits = clock, waits

    def drain(self, seconds: float) -> bool:
        """Note it; each wait takes two seconds."""
        self._waits.append(seconds)
        self._clock[0] += 2
        return False


class UngatedEngine(GatedEngine):
    """Computes at once."""

    provider = "test"

    def __init__(self) -> None:
        super().__init__()
        self.gate.release(1000)


Maker = Callable[..., Model]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Make a model with a name and a version."""
    recorded = manifest.read(write_version(tmp_path_factory.mktemp("registry") / "colors" / "1"))

    def make(name: str, version: int, batcher: Batcher | None = None) -> Model:
        engine = UngatedEngine()
        named = msgspec.structs.replace(recorded, model=name, version=version)
        return Model(named, engine, batcher or Batcher(engine.run), Statistics(name, version))

    return make


@pytest.fixture
def models(make_model: Maker) -> ModelRegistry:
    """The versions 1, 2 and 10 of `cats`, two of them with labels."""
    registry = ModelRegistry(make_model("cats", number) for number in (2, 10, 1))
    registry.retain("cats", (1, 2, 10), {"stable": 1, "canary": 2, "gone": 7})
    return registry


@pytest.mark.parametrize(
    ("name", "version", "label", "found"),
    [
        ("cats", 0, "", ("cats", 1)),
        ("cats", 2, "", ("cats", 2)),
        ("cats", 0, "stable", ("cats", 1)),
        ("cats", 10, "stable", ("cats", 10)),
        ("", 0, "", ("cats", 1)),
        ("", 2, "", ("cats", 2)),
        ("", 0, "canary", ("cats", 2)),
    ],
)
def test_a_request_finds_the_version_that_it_names(
    name: str, version: int, label: str, found: tuple[str, int], models: ModelRegistry
) -> None:
    """The stable one if it names none; a single model need not be named."""
    models.refuse("dogs", 1, "it is broken")
    model = models.find(name, version, label)
    assert (model.name, model.version) == found


def test_without_a_stable_version_the_latest_is_the_default(models: ModelRegistry, make_model: Maker) -> None:
    """But none that is served for a comparison only, unless there is no other."""
    models.retain("cats", (1, 2, 10), {"canary": 2})
    assert models.find("cats").version == 10
    models.set_aside("cats", 10)  # it is served already
    models.set_aside("cats", 11)
    models.add(make_model("cats", 11))
    assert models.find("cats").version == 10
    assert models.find("cats", 11).version == 11
    models.retain("cats", (2, 10), {}, aside={10})
    assert models.find("cats").version == 2
    models.retain("cats", (10,), {}, aside={10})
    assert models.find("cats").version == 10


def test_two_versions_share_the_requests_that_choose_neither(models: ModelRegistry, make_model: Maker) -> None:
    """By the key of each, also those for the stable version; never what asks about the server."""
    models.split("cats", TrafficSplit(1, 10, 50.0, "user"))
    keys = [str(number) for number in range(200)]
    found = {key: models.find("cats", find_key={"user": key}.__getitem__).version for key in keys}
    assert set(found.values()) == {1, 10}
    assert found == {key: models.find("", 0, "stable", {"user": key}.__getitem__).version for key in keys}
    for version, label, expected in ((2, "", 2), (1, "", 1), (0, "canary", 2)):
        assert {models.find("cats", version, label, lambda _, key=key: key).version for key in keys} == {expected}
    assert models.find("cats").version == 1
    models.retain("cats", (1, 2), {"stable": 1})  # the new version is removed from the disk
    assert {models.find("cats", find_key=lambda _, key=key: key).version for key in keys} == {1}
    models.add(make_model("cats", 10))
    assert models.get("cats").split is not None
    models.add(make_model("cats", 10))  # another one under its number
    assert models.get("cats").split is None


def test_whoever_follows_a_model_is_told_of_all_its_versions(models: ModelRegistry, make_model: Maker) -> None:
    """Also of those that come later, until it follows no longer."""

    class Ends:
        """Counts requests by version."""

        def __init__(self) -> None:
            self.versions: list[int] = []

        def end(self, request: TrackedRequest) -> None:
            """Count a request."""
            self.versions.append(request.version)

    ends, others = Ends(), Ends()
    models.follow("cats", ends)
    models.follow("cats", others)
    models.add(make_model("cats", 11))
    models.add(make_model("dogs", 1))
    for model in models:
        model.statistics.begin().fail(NotFound("gone"))
    assert ends.versions == others.versions == [1, 2, 10, 11]
    models.unfollow("cats", ends)
    models.add(make_model("cats", 12))
    for model in models:
        model.statistics.begin().fail(NotFound("gone"))
    assert ends.versions == [1, 2, 10, 11]
    assert others.versions == [1, 2, 10, 11, 1, 2, 10, 11, 12]


@pytest.mark.parametrize(
    ("name", "version", "label", "error", "sentence"),
    [
        ("birds", 0, "", NotFound, "there is no model 'birds'; this server has cats, dogs"),
        ("fish", 0, "", NotFound, "there is no model 'fish'; this server has cats, dogs"),
        ("", 0, "", InvalidRequest, "name one of the models cats, dogs"),
        ("", 1, "", InvalidRequest, "name one of the models cats, dogs"),
        ("cats", 3, "", NotFound, "version 3 of model 'cats' is not served; served versions: 1, 2, 10"),
        ("cats", 0, "gone", InvalidRequest, "no version label 'gone' of model 'cats'; its labels are: stable, canary"),
        ("dogs", 0, "stable", InvalidRequest, "no version label 'stable' of model 'dogs'; its labels are: none"),
    ],
)
def test_a_request_for_what_is_not_served_is_told_what_is(
    name: str,
    version: int,
    label: str,
    error: type[ServingError],
    sentence: str,
    models: ModelRegistry,
    make_model: Maker,
) -> None:
    """Refused versions are not served."""
    models.refuse("fish", 1, "it is broken")
    models.add(make_model("dogs", 1))
    with pytest.raises(error, match=re.escape(sentence)):
        models.find(name, version, label)


def test_nothing_is_found_where_nothing_is_served() -> None:
    """Neither is a name missing, nor does any help."""
    for name in ("", "cats"):
        with pytest.raises(NotFound, match=f"there is no model '{name}'; this server has none"):
            ModelRegistry().find(name)
    assert ModelRegistry().get("cats") == ServedVersions({}, {}, {})
    assert not ModelRegistry().serves_any()


def test_models_are_listed_by_name_and_number(models: ModelRegistry, make_model: Maker) -> None:
    """Refused ones have a name, but no version."""
    models.add(make_model("ants", 3))
    models.refuse("birds", 1, "it is broken")
    assert models.names() == ["ants", "birds", "cats"]
    served = [("ants", 3), ("cats", 1), ("cats", 2), ("cats", 10)]
    assert [(model.name, model.version) for model in models] == served
    assert list(models.counts()) == served
    assert models.serves_any()


def test_the_only_version_is_known_as_such(make_model: Maker) -> None:
    """While there is exactly one, of any model."""
    models = ModelRegistry()
    assert models.only is None
    models.add(first := make_model("cats", 1))
    models.refuse("cats", 2, "it is broken")
    assert models.only is first
    models.add(make_model("dogs", 1))
    assert models.only is None
    models.retain("dogs", (), {})
    assert models.only is first
    models.add(make_model("cats", 3))
    assert models.only is None
    models.retain("cats", (), {})
    assert models.only is None


def test_a_refusal_is_recorded_until_it_is_out_of_date(models: ModelRegistry, make_model: Maker) -> None:
    """Beside the served versions and other refusals; what is served again is not refused."""
    models.refuse("cats", 3, "it is broken")
    models.refuse("cats", 4, "it is signed by nobody")
    assert models.get("cats").refusals == {3: "it is broken", 4: "it is signed by nobody"}
    assert models.find("cats", 10).version == 10
    assert models.get("cats").labels == {"stable": 1, "canary": 2}
    models.retain("cats", (10, 99), {"stable": 1, "latest": 10}, keep_refusals=[3, 99])
    assert models.get("cats").refusals == {3: "it is broken"}
    assert models.get("cats").labels == {"latest": 10}
    assert list(models.get("cats").versions) == [10]
    models.add(make_model("cats", 3))
    assert models.get("cats").refusals == {}
    models.retain("cats", (), {})
    assert models.names() == []


def test_a_listener_is_told_when_a_model_comes_and_goes(models: ModelRegistry, make_model: Maker) -> None:
    """At once of those that are there, and later once for each change."""
    told: list[tuple[str, bool]] = []
    models.refuse("birds", 1, "it is broken")
    models.subscribe(lambda name, is_served: told.append((name, is_served)))
    assert told == [("birds", False), ("cats", True)]
    told.clear()
    models.add(make_model("dogs", 1))
    models.add(make_model("dogs", 2))
    models.refuse("fish", 1, "it is broken")
    models.retain("cats", (), {})
    models.retain("cats", (), {})
    assert told == [("dogs", True), ("cats", False)]


def test_closing_refuses_requests_for_every_version(models: ModelRegistry, make_model: Maker) -> None:
    """Of every model."""
    models.add(make_model("dogs", 1))
    models.close()
    for model in models:
        with pytest.raises(Unavailable):
            submit(model.batcher, images(1))


def test_draining_waits_for_all_that_were_ever_served_no_longer_than_it_may(
    make_model: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is for all of them together; a version that was replaced counts while it computes."""
    clock, waits = [1000.0], list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    models = ModelRegistry()
    replaced = make_model("cats", 1, RecordedBatcher(clock, waits))
    models.add(replaced)
    for number in (1, 2, 3):
        models.add(make_model("cats", number, RecordedBatcher(clock, waits)))
    removed = models.find("cats", 3)
    models.retain("cats", (1, 2), {})
    models.drain(5)
    assert waits == [5, 3, 1, 0]
    waits.clear()
    del removed, replaced
    gc.collect()
    models.drain(5)
    assert waits == [5, 3]
