"""The registry of a server's models: requests look versions up while others are added and removed."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from serving.errors import InvalidRequest, NotFound
from serving.models.model import Model
from serving.models.split import FindKey, TrafficSplit
from serving.models.statistics import Counts, Observer
from serving.scheduling.batcher import Batcher

STABLE = "stable"  # the label of the version for requests that name none


@dataclass(frozen=True)
class ServedVersions:
    """The versions of one model; replaced as a whole, never changed.

    Attributes:
        versions: The served versions, by number.
        labels: The number of a served version, by label.
        refusals: Why a version of the repository is not served, by number.
        aside: Numbers of versions that are no default: they are served for a shadow or a rollout.
        split: How two versions share the requests that choose neither; None if they all go to the default.
        remarks: What became of the rollout of a version, by number.
    """

    versions: Mapping[int, Model] = field(default_factory=dict)
    labels: Mapping[str, int] = field(default_factory=dict)
    refusals: Mapping[int, str] = field(default_factory=dict)
    aside: Collection[int] = ()
    split: TrafficSplit | None = None
    remarks: Mapping[int, str] = field(default_factory=dict)

    @property
    def default(self) -> int:
        """The number of the version for requests that name none: the stable one, or without that label the latest.

        0 if none is served.
        """
        if STABLE in self.labels:
            return self.labels[STABLE]
        return max(self.versions, key=lambda number: (number not in self.aside, number), default=0)


class ModelRegistry:
    """The models of a server, by name and version; threads may share it."""

    def __init__(self, models: Iterable[Model] = ()) -> None:
        """Begin with some versions."""
        self._lock = threading.Lock()
        # Replaced as a whole, never changed, so that reading needs no lock.
        self._served: Mapping[str, ServedVersions] = {}
        self.only: Model | None = None
        """The only served version, which every request is for; None if there are several."""
        # Weak references: a batcher, and the memory of its engine, is released with its last request.
        self._retired: weakref.WeakSet[Batcher] = weakref.WeakSet()
        self._observers: dict[str, tuple[Observer, ...]] = {}
        self._listeners: list[Callable[[str, bool], None]] = []
        for model in models:
            self.add(model)

    def find(self, name: str, version: int = 0, label: str = "", find_key: FindKey | None = None) -> Model:
        """Return the model that a request names.

        Args:
            name: Name of the model; may be empty if there is only one.
            version: Number of the version; 0 is the one with the label, or without a label the default.
            label: Label of the version; may be empty.
            find_key: Of a request that a version answers: while one is rolled out, its key decides which.

        Raises:
            InvalidRequest: No name is given although there are several models, or no version has the label.
            NotFound: The model or the version is not served.
        """
        served = self._served.get(name)
        if served is None or not served.versions:
            names = [key for key, other in self._served.items() if other.versions]
            if name or not names:
                raise NotFound(f"there is no model {name!r}; this server has {', '.join(names) or 'none'}")
            if len(names) > 1:
                raise InvalidRequest(f"name one of the models {', '.join(names)}")
            return self.find(names[0], version, label, find_key)
        if label and label not in served.labels:
            labels = ", ".join(served.labels) or "none"
            raise InvalidRequest(f"there is no version label {label!r} of model {name!r}; its labels are: {labels}")
        number = version or (served.labels[label] if label else served.default)
        if served.split and find_key and not version and label in ("", STABLE):
            number = served.split.choose(find_key)
            if number not in served.versions:  # it was just removed
                number = served.default
        model = served.versions.get(number)
        if model is None:
            numbers = ", ".join(map(str, sorted(served.versions)))
            raise NotFound(f"version {number} of model {name!r} is not served; served versions: {numbers}")
        return model

    def __iter__(self) -> Iterator[Model]:
        """Yield each served version of each model, ordered by name and number."""
        for name in self.names():
            for _, model in sorted(self.get(name).versions.items()):
                yield model

    def names(self) -> list[str]:
        """Return the names of the models with a served or refused version."""
        return sorted(self._served)

    def serves_any(self) -> bool:
        """Return whether any model is served."""
        return any(served.versions for served in self._served.values())

    def get(self, name: str) -> ServedVersions:
        """Return the versions of a model; none if the model is unknown."""
        return self._served.get(name, ServedVersions())

    def follow(self, name: str, observer: Observer) -> None:
        """Have an observer notified of the requests for each version of a model, also for those that are added."""
        with self._lock:
            self._observers[name] = (*self._observers.get(name, ()), observer)
            for model in self.get(name).versions.values():
                model.statistics.observers += (observer,)

    def unfollow(self, name: str, observer: Observer) -> None:
        """Notify an observer no longer."""
        with self._lock:
            self._observers[name] = tuple(other for other in self._observers.get(name, ()) if other is not observer)
            for model in self.get(name).versions.values():
                statistics = model.statistics
                statistics.observers = tuple(other for other in statistics.observers if other is not observer)

    def set_aside(self, name: str, number: int) -> None:
        """Let a version be no default when it is added."""
        with self._lock:
            served = self.get(name)
            if number not in served.versions:
                self._replace(name, replace(served, aside={*served.aside, number}))

    def split(self, name: str, split: TrafficSplit | None) -> None:
        """Have two versions of a model share requests from now on, or no longer."""
        with self._lock:
            self._replace(name, replace(self.get(name), split=split))

    def remark(self, name: str, remarks: Mapping[int, str]) -> None:
        """Replace what is said of the versions of a model, by number, whether they are served or not."""
        with self._lock:
            self._replace(name, replace(self.get(name), remarks=remarks))

    def counts(self) -> dict[tuple[str, int], Counts]:
        """Return the counts of each served version, by name and number."""
        return {(model.name, model.version): model.statistics.counts() for model in self}

    def subscribe(self, listener: Callable[[str, bool], None]) -> None:
        """Call `listener` with each model's name and whether it is served, now and at every change."""
        with self._lock:
            self._listeners.append(listener)
            for name in self.names():
                listener(name, bool(self.get(name).versions))

    def add(self, model: Model) -> None:
        """Serve a further version, which is the default if its number is the highest and no other one is stable."""
        with self._lock:
            served = self.get(model.name)
            model.statistics.observers += self._observers.get(model.name, ())
            split = served.split
            if split and split.canary == model.version and model.version in served.versions:
                split = None  # it is another one under the same number
            refusals = {number: reason for number, reason in served.refusals.items() if number != model.version}
            self._replace(
                model.name,
                replace(served, versions={**served.versions, model.version: model}, refusals=refusals, split=split),
            )

    def refuse(self, name: str, version: int, reason: str) -> None:
        """Record why a version is not served."""
        with self._lock:
            served = self.get(name)
            self._replace(name, replace(served, refusals={**served.refusals, version: reason}))

    def retain(
        self,
        name: str,
        versions: Collection[int],
        labels: Mapping[str, int],
        aside: Collection[int] = (),
        keep_refusals: Collection[int] = (),
    ) -> None:
        """Serve only some of a model's versions, under these labels; running requests keep their version.

        Args:
            name: Name of the model.
            versions: Numbers of the versions to retain; none is added.
            labels: Numbers by label; labels of versions that are not served are left out.
            aside: Numbers of the versions that are no default.
            keep_refusals: Numbers of the versions whose refusal stays recorded.
        """
        with self._lock:
            served = self.get(name)
            retained = {number: model for number, model in served.versions.items() if number in versions}
            self._replace(
                name,
                replace(
                    served,
                    versions=retained,
                    labels={label: number for label, number in labels.items() if number in retained},
                    refusals={number: reason for number, reason in served.refusals.items() if number in keep_refusals},
                    aside=aside,
                ),
            )

    def close(self) -> None:
        """Refuse further requests; queued ones are still computed."""
        for model in self:
            model.batcher.close()

    def drain(self, seconds: float) -> None:
        """Wait until all requests are answered, for at most `seconds`."""
        end = time.monotonic() + seconds
        with self._lock:
            batchers = [*self._retired, *(model.batcher for model in self)]
        for batcher in batchers:
            batcher.drain(max(0.0, end - time.monotonic()))

    def _replace(self, name: str, served: ServedVersions) -> None:
        """Replace the versions of a model. The lock is held."""
        before = self.get(name)
        self._retired.update(
            model.batcher for number, model in before.versions.items() if served.versions.get(number) is not model
        )
        others = {key: value for key, value in self._served.items() if key != name}
        self._served = {**others, name: served} if served.versions or served.refusals else others
        versions = [model for one in self._served.values() for model in one.versions.values()]
        self.only = versions[0] if len(versions) == 1 else None
        if bool(before.versions) != bool(served.versions):
            for listener in self._listeners:
                listener(name, bool(served.versions))
