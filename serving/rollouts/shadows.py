"""The shadows of a server, one for a model: what its answers are compared with, until that is changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from resnet import BadInput
from serving.errors import FailedPrecondition, InvalidRequest, NotFound, ServingError
from serving.models.registry import ModelRegistry
from serving.models.watcher import Watcher
from serving.rollouts.agreement import Agreement
from serving.rollouts.images import ImageFolder
from serving.rollouts.others import Originals, Others, ServedOthers
from serving.rollouts.rollout import check_pair
from serving.rollouts.shadow import Shadow

ORIGINAL = "original"  # in place of a version


@dataclass(frozen=True)
class ShadowSettings:
    """What the answers for a model are compared with.

    Attributes:
        other: Number or label of a version, or `original` for the Keras original.
        percent: Share of the requests, above 0, at most 100.
    """

    other: str
    percent: float = 100.0


@dataclass(frozen=True)
class OpenShadow:
    """A shadow, and what it holds.

    Attributes:
        settings: As it was asked for.
        shadow: Compares the answers.
        held: Number of the version that is served for it; 0 if none is.
    """

    settings: ShadowSettings
    shadow: Shadow
    held: int


def parse(text: str) -> Mapping[str, ShadowSettings]:
    """Parse shadows separated by spaces, as in `digits=3:10 cats=original`.

    Args:
        text: Each is NAME=VERSION or NAME=VERSION:PERCENT; VERSION is a number, a label or `original`.

    Returns:
        The settings by the name of the model.

    Raises:
        BadInput: One cannot be parsed, or a model has two.
    """
    found: dict[str, ShadowSettings] = {}
    for word in text.split():
        name, _, rest = word.partition("=")
        other, colon, share = rest.partition(":")
        try:
            percent = float(share.removesuffix("%")) if colon else 100.0
        except ValueError:
            percent = 0.0
        if not (name and other and 0 < percent <= 100):
            raise BadInput(f"{word!r} is no shadow; write NAME=VERSION:PERCENT, as in digits=3:10 or digits=original")
        if name in found:
            raise BadInput(f"{text!r} has two shadows for {name}; write one")
        found[name] = ShadowSettings(other, percent)
    return found


class Shadows:
    """The open shadows of a server."""

    def __init__(
        self,
        models: ModelRegistry,
        watcher: Watcher,
        is_idle: Callable[[], bool],
        keep_images: Path | None = None,
    ) -> None:
        """Begin without any.

        Args:
            models: The served models.
            watcher: Loads the versions to compare with.
            is_idle: As in `Shadow`.
            keep_images: Folder for the images that are answered most differently; None keeps none.
        """
        self._models, self._watcher, self._is_idle, self._keep_images = models, watcher, is_idle, keep_images
        self._lock = threading.Lock()  # held while a version is loaded, too
        self._open: dict[str, OpenShadow] = {}

    def find(self, name: str) -> OpenShadow | None:
        """Return the shadow of a model."""
        return self._open.get(name)

    def set(self, name: str, settings: ShadowSettings | None) -> None:
        """Compare the answers for a model from now on, in place of what they were compared with; None ends that.

        Raises:
            ServingError: There is no such version, or it cannot be loaded or compared; nothing is changed.
            BadInput: Keras is missing, or the process may have no further thread.
        """
        with self._lock:
            opened = None if settings is None else self._start(name, settings)
            if before := self._open.pop(name, None):
                self._end(name, before)
            if opened:
                self._models.follow(name, opened.shadow)
                self._open[name] = opened

    def close(self) -> None:
        """Compare nothing more; this waits for nothing that is being loaded."""
        for opened in list(self._open.values()):
            opened.shadow.close()

    def _start(self, name: str, settings: ShadowSettings) -> OpenShadow:
        if not 0 < settings.percent <= 100:
            raise InvalidRequest(f"a shadow's share is a percentage above 0, at most 100; not {settings.percent:g}")
        folder, _ = self._watcher.find_folder(name)
        served = self._models.get(name)
        if not served.versions:
            raise NotFound(f"model {name!r} is not served")
        stable, other = served.versions[served.default], settings.other
        is_number = other.isascii() and other.isdecimal()
        number = int(other[:19]) if is_number else served.labels.get(other, 0)
        if other == ORIGINAL:
            others: Others = Originals(self._models, name, folder)
        elif not is_number and not number:
            raise NotFound(f"model {name!r} has no version or label {other!r}")
        elif number == stable.version:
            raise FailedPrecondition(f"version {number} of model {name!r} answers by itself; compare it with another")
        elif is_number:
            others = ServedOthers(self._models, name, lambda _: number)
        else:
            others = ServedOthers(self._models, name, lambda _: self._models.get(name).labels.get(other))
        version = self._watcher.hold(name, number) if is_number else served.versions.get(number, stable)
        try:
            check_pair(version, stable)
            images = ImageFolder.open(self._keep_images, name)
            shadow = Shadow(
                Agreement(stable.manifest.labels, images),
                others,
                self._is_idle,
                settings.percent,
                on_hang=lambda: self._end_hanging(name),
            )
        except (ServingError, BadInput):
            if is_number:
                self._watcher.release(name, number)
            raise
        return OpenShadow(settings, shadow, number if is_number else 0)

    def _end_hanging(self, name: str) -> None:
        """End a shadow whose version hangs, and take that out of service before a watchdog ends the server for it."""
        self.set(name, None)
        self._watcher.refresh(name)

    def _end(self, name: str, opened: OpenShadow) -> None:
        self._models.unfollow(name, opened.shadow)
        opened.shadow.close()
        if opened.held:
            self._watcher.release(name, opened.held)
