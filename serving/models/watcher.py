"""Follows a model repository: a new version is loaded, checked and warmed up before it takes the old one's place."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from export import repository
from resnet import BadInput
from serving.errors import FailedPrecondition, NotFound
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.models.version_policy import VersionPolicy

log = logging.getLogger(__name__)


class Watcher:
    """Keeps the models of a server those of a repository, as far as policies choose them.

    Beside the versions that the policy of a model chooses, those with a label are served. A version that cannot be
    loaded is refused, and the policy chooses among the others: with the latest one broken, the one before it stays.
    Requests under way end with the version they began with.
    """

    def __init__(
        self,
        folder: Path,
        models: ModelRegistry,
        load: Callable[[Path], Model],
        policies: Mapping[str, VersionPolicy] | None = None,
    ) -> None:
        """Watch nothing yet.

        Args:
            folder: The model repository.
            models: What is served.
            load: Loads and warms up the version in a folder.
            policies: Which versions of a model to serve, by its name, and under the empty name for all others; None is
                the latest of each.
        """
        self._folder, self._models, self._load = folder, models, load
        self._policies = {"": VersionPolicy(), **(policies or {})}
        self._unloaded: set[str] = set()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Load what the repository holds.

        Raises:
            BadInput: There is none, a version does not load, or a policy chooses none of a model's versions.
            CheckFailed: A version is not signed by the key that is trusted.
        """
        for folder in repository.models(self._folder):
            self._follow(folder, strict=True)
            if not self._models.get(folder.name).versions:
                found = repository.versions(folder)
                raise BadInput(f"--versions chooses none of the versions of {folder.name}, which are {found}")

    def scan(self) -> None:
        """Look at the repository once, and follow what changed."""
        with self._lock:
            try:
                found = {folder.name: folder for folder in repository.models(self._folder)}
            except (BadInput, OSError) as error:  # as while a disk is mounted: what is served is not given up for that
                log.error("the served models stay: %s", error)
                return
            for name, folder in found.items():
                if name not in self._unloaded:
                    self._follow(folder)
            for name in self._models.names():
                if name not in found:
                    log.info("%s is no longer served, it was removed", name)
                    self._models.retain(name, (), {})
                    self._unloaded.discard(name)

    def load(self, name: str, policy: VersionPolicy | None = None) -> None:
        """Serve what the repository holds of a model, and follow it from now on; versions that were refused get a try.

        Args:
            name: Of the model.
            policy: Which versions to serve from now on; None leaves the policy as it is.

        Raises:
            NotFound: The repository has no such model.
            FailedPrecondition: A version cannot be loaded, or the policy chooses none; what was served still is.
        """
        with self._lock:
            # Looked up, never made into a path: what a request says does not reach the file system.
            folders = {folder.name: folder for folder in repository.models(self._folder)}
            if name not in folders:
                raise NotFound(f"the repository has no model {name!r}; it has {', '.join(folders)}")
            if policy is not None:
                found = repository.versions(folders[name])
                if not policy.choose(found):
                    raise FailedPrecondition(f"the policy chooses none of the versions of model {name!r}: {found}")
                self._policies[name] = policy
            self._unloaded.discard(name)
            before = self._models.get(name)
            self._models.retain(name, before.versions.keys(), before.labels)
            self._follow(folders[name])
            served = self._models.get(name)
            for number, reason in served.refusals.items():
                raise FailedPrecondition(f"version {number} of model {name!r} is not served: {reason}")

    def unload(self, name: str) -> None:
        """Serve a model no longer, until it is loaded again.

        Raises:
            NotFound: It is not served.
        """
        with self._lock:
            versions = self._models.get(name).versions
            if not versions:
                raise NotFound(f"model {name!r} is not served")
            self._unloaded.add(name)
            self._models.retain(name, (), {})
            for number in versions:
                self._models.refuse(name, number, "unloaded by request")
            log.info("%s is no longer served, by request", name)

    def _follow(self, folder: Path, strict: bool = False) -> None:
        """Serve the versions of a model that its policy chooses, and no others; `strict` raises what keeps one out."""
        name, found, labels = folder.name, repository.versions(folder), repository.labels(folder)
        policy = self._policies.get(name, self._policies[""])
        while True:
            served = self._models.get(name)
            sound = [number for number in found if number not in served.refusals]
            chosen = {*policy.choose(sound), *(number for number in labels.values() if number in sound)}
            missing = chosen - served.versions.keys()
            if not missing:
                break
            self._try(folder, max(missing), strict)
        # Where nothing holds, what was served stays.
        self._models.retain(name, chosen or served.versions.keys(), labels, known=found)

    def _try(self, folder: Path, number: int, strict: bool) -> None:
        try:
            model = self._load(folder / str(number))
        except Exception as error:
            if strict:
                raise
            # Whatever it was, the other versions keep serving.
            log.error("%s/%d is not served: %s", folder.name, number, error)
            self._models.refuse(folder.name, number, str(error))
        else:
            self._models.add(model)
            log.info("%s/%d is served", folder.name, number)
