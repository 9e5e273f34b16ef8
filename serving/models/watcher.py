"""Watches a model repository: a new version is loaded, checked and warmed up before it replaces the old one."""

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
    """Serves the models of a repository: the versions that policies choose, and those with a label.

    A version that cannot be loaded is refused, and the policy chooses among the others: if the latest one is broken,
    the one before it stays. Running requests finish with the version they began with.
    """

    def __init__(
        self,
        folder: Path,
        models: ModelRegistry,
        load: Callable[[Path], Model],
        policies: Mapping[str, VersionPolicy] | None = None,
    ) -> None:
        """Load nothing yet: `start` does.

        Args:
            folder: The model repository.
            models: Registry of the served models.
            load: Loads and warms up the version in a folder.
            policies: Version policies by model name, and under the empty name that of all other models; None serves the
                latest version of each model.
        """
        self._folder, self._models, self._load = folder, models, load
        self._policies = {"": VersionPolicy(), **(policies or {})}
        self._unloaded: set[str] = set()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Load the models of the repository.

        Raises:
            BadInput: There is no repository, a version cannot be loaded, or a policy chooses no version of a model.
            CheckFailed: A version is not signed by the trusted key.
        """
        for folder in repository.models(self._folder):
            self._update(folder, strict=True)
            if not self._models.get(folder.name).versions:
                available = repository.versions(folder)
                raise BadInput(f"--versions chooses none of the versions of {folder.name}, which are {available}")

    def scan(self) -> None:
        """Look for changes of the repository once, and apply them."""
        with self._lock:
            try:
                folders = {folder.name: folder for folder in repository.models(self._folder)}
            except (BadInput, OSError) as error:  # as while a disk is being mounted: that must not end the service
                log.error("the served models stay: %s", error)
                return
            for name, folder in folders.items():
                if name not in self._unloaded:
                    self._update(folder)
            for name in self._models.names():
                if name not in folders:
                    log.info("%s is no longer served, it was removed", name)
                    self._models.retain(name, (), {})
                    self._unloaded.discard(name)

    def load(self, name: str, policy: VersionPolicy | None = None) -> None:
        """Serve a model of the repository from now on; versions that were refused are tried again.

        Args:
            name: Name of the model.
            policy: The new version policy; None keeps the current one.

        Raises:
            NotFound: The repository has no such model.
            FailedPrecondition: A version cannot be loaded, or the policy chooses none; the served versions stay.
        """
        with self._lock:
            # The name is looked up, never made into a path: no text of a request reaches the file system.
            folders = {folder.name: folder for folder in repository.models(self._folder)}
            if name not in folders:
                raise NotFound(f"the repository has no model {name!r}; it has {', '.join(folders)}")
            if policy is not None:
                available = repository.versions(folders[name])
                if not policy.choose(available):
                    raise FailedPrecondition(f"the policy chooses none of the versions of model {name!r}: {available}")
                self._policies[name] = policy
            self._unloaded.discard(name)
            before = self._models.get(name)
            self._models.retain(name, before.versions.keys(), before.labels)
            self._update(folders[name])
            served = self._models.get(name)
            for number, reason in served.refusals.items():
                raise FailedPrecondition(f"version {number} of model {name!r} is not served: {reason}")

    def unload(self, name: str) -> None:
        """Stop serving a model until it is loaded again.

        Raises:
            NotFound: The model is not served.
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

    def _update(self, folder: Path, strict: bool = False) -> None:
        """Serve the versions of a model that its policy chooses; `strict` raises if one cannot be loaded."""
        name, available, labels = folder.name, repository.versions(folder), repository.labels(folder)
        policy = self._policies.get(name, self._policies[""])
        while True:
            served = self._models.get(name)
            candidates = [number for number in available if number not in served.refusals]
            chosen = {*policy.choose(candidates), *(number for number in labels.values() if number in candidates)}
            missing = chosen - served.versions.keys()
            if not missing:
                break
            self._load_version(folder, max(missing), strict)
        # If no version can be loaded, the served ones stay.
        self._models.retain(name, chosen or served.versions.keys(), labels, keep_refusals=available)

    def _load_version(self, folder: Path, number: int, strict: bool) -> None:
        try:
            model = self._load(folder / str(number))
        except Exception as error:
            if strict:
                raise
            # Whatever the error is, the other versions stay served.
            log.error("%s/%d is not served: %s", folder.name, number, error)
            self._models.refuse(folder.name, number, str(error))
        else:
            self._models.add(model)
            log.info("%s/%d is served", folder.name, number)
