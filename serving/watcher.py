"""Follows a model repository: a new version is loaded, checked and warmed up before it takes the old one's place."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from export import repository
from resnet import BadInput
from serving.models import Model, Models

log = logging.getLogger(__name__)


class Watcher:
    """Keeps the models of a server those of a repository.

    The latest version of each model is served; if that is removed, the one before it is again. A version that cannot be
    loaded is refused, and the one that is served stays. Requests under way end with the version they began with.
    """

    def __init__(self, folder: Path, models: Models, load: Callable[[Path], Model]) -> None:
        """Watch nothing yet.

        Args:
            folder: The model repository.
            models: What is served.
            load: Loads and warms up the version in a folder.
        """
        self._folder, self._models, self._load = folder, models, load
        self._lock = threading.Lock()

    def scan(self) -> None:
        """Look at the repository once, and follow what changed."""
        with self._lock:
            try:
                found = {folder.name: repository.latest(folder) for folder in repository.models(self._folder)}
            except (BadInput, OSError) as error:  # as while a disk is mounted: what is served is not given up for that
                log.error("the served models stay: %s", error)
                return
            for name, version in found.items():
                self._follow(name, version)
            for model in self._models:
                if model.name not in found:
                    log.info("%s/%d is no longer served, it was removed", model.name, model.version)
                    self._models.remove(model.name)

    def _follow(self, name: str, version: Path) -> None:
        number = int(version.name)
        if self._models.serves(name, number) or self._models.has_refused(name, number):
            return
        try:
            model = self._load(version)
        except Exception as error:  # whatever it was, the old version keeps serving
            log.error("%s/%d is not served: %s", name, number, error)
            self._models.refuse(name, number, str(error))
        else:
            self._models.put(model)
            log.info("%s/%d is served", name, number)
