"""The models of a server, by name and version; requests read it while versions come and go."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from serving.errors import InvalidRequest, NotFound
from serving.models.model import Model
from serving.models.statistics import Counts
from serving.scheduling.batcher import Batcher


@dataclass(frozen=True)
class ServedVersions:
    """What of one model is served; replaced whole, never changed.

    Attributes:
        versions: By number.
        labels: Numbers by label, each that of a version.
        refusals: Why a version that the repository has is not served, by number.
    """

    versions: Mapping[int, Model] = field(default_factory=dict)
    labels: Mapping[str, int] = field(default_factory=dict)
    refusals: Mapping[int, str] = field(default_factory=dict)


class ModelRegistry:
    """The models of a server, by name and version. Requests read it while versions come and go."""

    def __init__(self, models: Iterable[Model] = ()) -> None:
        """Hold some versions."""
        self._lock = threading.Lock()
        # Replaced whole, never changed: whoever reads it needs no lock.
        self._served: Mapping[str, ServedVersions] = {}
        self.only: Model | None = None
        """The one version that is served, if it is the only one: every request is for it."""
        # Who still uses a batcher keeps it: when the last request is answered, its engine gives its memory back.
        self._retired: weakref.WeakSet[Batcher] = weakref.WeakSet()
        self._listeners: list[Callable[[str, bool], None]] = []
        for model in models:
            self.add(model)

    def find(self, name: str, version: int = 0, label: str = "") -> Model:
        """Return the model that a request names.

        Args:
            name: Empty where there is just one model.
            version: 0 for the latest, or for the one that has the label.
            label: Empty for none.

        Raises:
            InvalidRequest: No name was given although there are several models, or no version has the label.
            NotFound: There is no such model or version.
        """
        served = self._served.get(name)
        if served is None or not served.versions:
            names = [key for key, other in self._served.items() if other.versions]
            if name or not names:
                raise NotFound(f"there is no model {name!r}; this server has {', '.join(names) or 'none'}")
            if len(names) > 1:
                raise InvalidRequest(f"name one of the models {', '.join(names)}")
            return self.find(names[0], version, label)
        if label and label not in served.labels:
            labels = ", ".join(served.labels) or "none"
            raise InvalidRequest(f"there is no version label {label!r} of model {name!r}; its labels are: {labels}")
        number = version or (served.labels[label] if label else max(served.versions))
        model = served.versions.get(number)
        if model is None:
            numbers = ", ".join(map(str, sorted(served.versions)))
            raise NotFound(f"version {number} of model {name!r} is not served; served are: {numbers}")
        return model

    def __iter__(self) -> Iterator[Model]:
        """Yield each version of each model, by name and number."""
        for name in self.names():
            for _, model in sorted(self.get(name).versions.items()):
                yield model

    def names(self) -> list[str]:
        """Return the names of the models that have a version, served or refused."""
        return sorted(self._served)

    def get(self, name: str) -> ServedVersions:
        """Return what of a model is served or refused; nothing, if it is unknown."""
        return self._served.get(name, ServedVersions())

    def counts(self) -> dict[tuple[str, int], Counts]:
        """Return what was answered so far, by name and version."""
        return {(model.name, model.version): model.statistics.counts() for model in self}

    def subscribe(self, listener: Callable[[str, bool], None]) -> None:
        """Call `listener` with the name of a model and whether it is served: now for each, later on each change."""
        with self._lock:
            self._listeners.append(listener)
            for name in self.names():
                listener(name, bool(self.get(name).versions))

    def add(self, model: Model) -> None:
        """Serve one more version; as the latest, if its number is the highest."""
        with self._lock:
            served = self.get(model.name)
            refusals = {number: why for number, why in served.refusals.items() if number != model.version}
            self._replace(
                model.name,
                replace(served, versions={**served.versions, model.version: model}, refusals=refusals),
            )

    def refuse(self, name: str, version: int, reason: str) -> None:
        """Note why a version is not served."""
        with self._lock:
            served = self.get(name)
            self._replace(name, replace(served, refusals={**served.refusals, version: reason}))

    def retain(
        self, name: str, versions: Collection[int], labels: Mapping[str, int], known: Collection[int] = ()
    ) -> None:
        """Serve none of a model's versions but these, under these labels; requests that have found another end with it.

        Args:
            name: Of the model.
            versions: Numbers; those that are not served yet stay so.
            labels: Numbers by label; one of a version that is not served is left out.
            known: Numbers whose refusal stays on record.
        """
        with self._lock:
            served = self.get(name)
            kept = {number: model for number, model in served.versions.items() if number in versions}
            self._replace(
                name,
                ServedVersions(
                    versions=kept,
                    labels={label: number for label, number in labels.items() if number in kept},
                    refusals={number: why for number, why in served.refusals.items() if number in known},
                ),
            )

    def close(self) -> None:
        """Refuse further requests; those that wait are still computed."""
        for model in self:
            model.batcher.close()

    def drain(self, seconds: float) -> None:
        """Wait for the requests under way, for at most so long."""
        end = time.monotonic() + seconds
        with self._lock:
            batchers = [*self._retired, *(model.batcher for model in self)]
        for batcher in batchers:
            batcher.drain(max(0.0, end - time.monotonic()))

    def _replace(self, name: str, served: ServedVersions) -> None:
        """Put what is served of a model in place of what was; the lock is held."""
        before = self.get(name)
        gone = (model.batcher for number, model in before.versions.items() if served.versions.get(number) is not model)
        self._retired.update(gone)
        others = {key: value for key, value in self._served.items() if key != name}
        self._served = {**others, name: served} if served.versions or served.refusals else others
        versions = [model for one in self._served.values() for model in one.versions.values()]
        self.only = versions[0] if len(versions) == 1 else None
        if bool(before.versions) != bool(served.versions):
            for listener in self._listeners:
                listener(name, bool(served.versions))
