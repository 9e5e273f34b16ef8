"""Watches a model repository: a new version is loaded, checked and warmed up before it replaces the old one."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from export import manifest, repository
from export.inspection import fingerprint
from resnet import BadInput, CheckFailed
from serving.errors import FailedPrecondition, NotFound, ServingError
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.models.version_policy import VersionPolicy
from serving.process import release_memory

log = logging.getLogger(__name__)


class Watcher:
    """Serves the models of a repository: the versions that policies choose, and those that have a label or are held.

    A version that cannot be loaded is refused until its files change, and the policy chooses among the others: if the
    latest one is broken, the one before it is served. One whose folder holds another manifest is loaded again. Running
    requests finish with the version they began with.
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
        self._held: Counter[tuple[str, int]] = Counter()
        self._held_lock = threading.Lock()
        self._problems: dict[str, str] = {}
        self._loaded: dict[tuple[str, int], Hashable] = {}
        self._refused: dict[tuple[str, int], Hashable] = {}
        self._lock = threading.Lock()

    def start(self, strict: bool = False) -> None:
        """Load the models of the repository. What cannot be served costs only itself.

        Raises:
            BadInput: The folder is missing, or is no repository.
            CheckFailed: With `strict`, something cannot be served, or there is nothing to serve.
        """
        mistake = repository.find_mistake(self._folder)
        if mistake:
            raise BadInput(mistake)
        self.scan()
        for name in sorted(self._policies.keys() - {"", *self._models.names(), *self._problems}):
            log.warning("--versions names %s, which %s does not hold", name, self._folder)
        if strict:
            for reason in self._list_refusals():
                raise CheckFailed(f"--strict: {reason}")
        if not self._models.serves_any():
            if strict:
                raise CheckFailed(f"--strict: {self._folder} holds no model that can be served")
            log.warning("no model is served until %s holds one that can be", self._folder)

    def scan(self, retry: bool = False) -> None:
        """Look for changes of the repository once, and apply them; no error of the file system leaves this method.

        Args:
            retry: Load refused versions again, even if nothing in their folders has changed.
        """
        with self._lock:
            # While a disk is being mounted, its folder is missing or empty: that must not end the service.
            try:
                folders = repository.folders(self._folder)
            except OSError as error:
                self._report("", f"the served models stay, {self._folder} cannot be read ({error.strerror})")
                return
            if self._models.serves_any() and not any(map(repository.has_versions, folders)):
                self._report("", f"the served models stay, {self._folder} holds no models")
                return
            self._report("", None)
            for folder in folders:
                if folder.name not in self._unloaded:
                    self._report(folder.name, self._update(folder, self._find_policy(folder.name), retry))
            for name in {*self._models.names(), *self._problems} - {"", *(folder.name for folder in folders)}:
                self._forget(name)

    def load(self, name: str, policy: VersionPolicy | None = None) -> None:
        """Serve a model of the repository from now on; versions that were refused are tried again.

        Args:
            name: Name of the model.
            policy: The new version policy; None keeps the current one.

        Raises:
            NotFound: The repository has no such model.
            FailedPrecondition: A version cannot be loaded, or the policy chooses none; nothing is changed.
        """
        with self._lock:
            folder, available = self.find_folder(name)
            if policy is not None and not policy.choose(available):
                raise FailedPrecondition(f"the policy chooses none of the versions of model {name!r}: {available}")
            chosen_by = policy or self._find_policy(name)
            problem = self._update(folder, chosen_by, retry=True, whole=True)
            if problem:
                raise FailedPrecondition(problem)
            self._policies[name] = chosen_by
            self._unloaded.discard(name)
            self._report(name, None)

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

    def hold(self, name: str, number: int) -> Model:
        """Serve a version from now on, whatever the policy of its model chooses, and return it; it is no default.

        Raises:
            NotFound: The repository has no such version.
            FailedPrecondition: It cannot be loaded.
        """
        with self._lock:
            folder, available = self.find_folder(name)
            if number not in available:
                raise NotFound(f"the repository has no version {number} of model {name!r}; it has {available}")
            with self._held_lock:
                self._held[name, number] += 1
            self._models.set_aside(name, number)
            self._refused.pop((name, number), None)  # it may have been refused for what was mended since
            problem = self._update(folder, self._find_policy(name), retry=False)
            served = self._models.get(name)
            if number not in served.versions:
                self.release(name, number)
                reason = served.refusals.get(number) or problem
                raise FailedPrecondition(f"version {number} of model {name!r} cannot be served: {reason}")
            return served.versions[number]

    def release(self, name: str, number: int) -> None:
        """Take back a `hold`: after the last one, a version is served no longer than the policy of its model says.

        This waits for nothing that is being loaded.
        """
        with self._held_lock:
            self._held[name, number] -= 1

    def refresh(self, name: str) -> None:
        """Serve what the policy, the labels and the holds of a model choose now."""
        with self._lock, suppress(ServingError):
            folder, _ = self.find_folder(name)
            if name not in self._unloaded:
                self._update(folder, self._find_policy(name), retry=False)

    def label(self, name: str, label: str, number: int) -> None:
        """Set a label in the repository, and serve its version under it at once.

        Raises:
            FailedPrecondition: The label cannot be set.
        """
        with self._lock:
            folder, _ = self.find_folder(name)
            try:
                repository.label(folder, label, number)
            except (BadInput, OSError) as error:
                raise FailedPrecondition(f"the label {label!r} of model {name!r} cannot be set: {error}") from None
            self._update(folder, self._find_policy(name), retry=False)

    def find_folder(self, name: str) -> tuple[Path, list[int]]:
        """Return the folder of a model and its versions. The name is looked up: no text of a request becomes a path.

        Raises:
            NotFound: The repository has no such model.
            FailedPrecondition: The repository cannot be read.
        """
        try:
            folders = {folder.name: folder for folder in repository.folders(self._folder)}
            available = repository.versions(folders[name]) if name in folders else []
        except OSError as error:
            raise FailedPrecondition(f"model {name!r} cannot be loaded: {error}") from None
        if not available:
            raise NotFound(f"the repository has no model {name!r}; it has {', '.join(folders) or 'none'}")
        return folders[name], available

    def _find_policy(self, name: str) -> VersionPolicy:
        return self._policies.get(name, self._policies[""])

    def _update(self, folder: Path, policy: VersionPolicy, retry: bool, whole: bool = False) -> str | None:
        """Serve the versions of a model that a policy chooses; return what prevents that, or None.

        Args:
            folder: Folder of the model.
            policy: The policy.
            retry: Load refused versions again, even if nothing in their folders has changed.
            whole: Change nothing if a version that is chosen cannot be loaded; False chooses another in its place.
        """
        name, is_name = folder.name, repository.MODEL_NAME.fullmatch(folder.name)
        try:
            available, labels = repository.versions(folder), repository.labels(folder)
        except OSError as error:
            return f"{folder} cannot be read ({error.strerror})" if is_name else None
        if not available:
            self._forget(name)
            return None
        if not is_name:
            return f"{name!r} is not served: a model is named by letters, digits, dots, dashes and underscores"
        served = self._models.get(name).versions
        replaced = {number for number in available if number in served and self._is_replaced(folder, number, retry)}
        unchanged = {number for number in available if self._is_unchanged(folder, number)}
        refused: set[int] = set() if retry else unchanged - served.keys()
        loaded: dict[int, Model] = {}
        while True:
            candidates = [number for number in available if number not in refused]
            usual = {*policy.choose(candidates), *(number for number in labels.values() if number in candidates)}
            aside = {number for number in candidates if self._held[name, number] > 0} - usual
            chosen = usual | aside
            missing = chosen - (served.keys() - replaced) - loaded.keys()
            if not missing:
                break
            number = max(missing)
            outcome = self._load_version(folder, number)
            if not isinstance(outcome, str):
                loaded[number] = outcome
            elif number in served:
                replaced.remove(number)
                log.error("the served %s/%d stays, what replaced its files cannot be: %s", name, number, outcome)
            else:
                if self._models.get(name).refusals.get(number) != outcome:
                    log.error("%s/%d is not served: %s", name, number, outcome)
                self._models.refuse(name, number, outcome)
                refused.add(number)
            if whole and isinstance(outcome, str):
                return f"version {number} of model {name!r} is not served: {outcome}"
        for model in loaded.values():
            self._models.add(model)
            log.info("%s/%d is served", name, model.version)
        # If no version can be loaded, the served ones stay.
        self._models.retain(name, chosen or served.keys(), labels, aside, keep_refusals=unchanged | refused)
        if not chosen and not refused:
            return f"{name} is not served: --versions chooses none of its versions, which are {available}"
        return None

    def _load_version(self, folder: Path, number: int) -> Model | str:
        """Load a version; if that fails, return why."""
        path, key = folder / str(number), (folder.name, number)
        # Taken before the files are read: what changes while they are is looked at again.
        before = fingerprint(path)
        try:
            model = self._load(path)
        except Exception as error:  # whatever it is, the other versions stay served
            self._refused[key] = before
            return str(error)
        release_memory()
        self._refused.pop(key, None)
        self._loaded[key] = before
        return model

    def _is_replaced(self, folder: Path, number: int, strictly: bool) -> bool:
        """Return whether the folder of a served version holds another one.

        Args:
            folder: Folder of the model.
            number: Number of the version.
            strictly: Also if any file was touched; False looks whether the manifest is another one. Some file systems
                touch files by themselves, and other changes make no version that could be served.
        """
        path, key = folder / str(number), (folder.name, number)
        if fingerprint(path) == self._loaded.get(key) or (self._is_unchanged(folder, number) and not strictly):
            return False
        try:
            digest = manifest.read(path).digest
        except BadInput:  # it is being copied, or is none
            return True
        return strictly or digest != self._models.get(folder.name).versions[number].manifest.digest

    def _is_unchanged(self, folder: Path, number: int) -> bool:
        """Return whether a version was refused, and nothing that is inspected has changed since."""
        refused = self._refused.get((folder.name, number))
        return refused is not None and refused == fingerprint(folder / str(number))

    def _forget(self, name: str) -> None:
        """Stop serving a model that was removed."""
        if self._models.get(name).versions:
            log.info("%s is no longer served, it was removed", name)
        self._models.retain(name, (), {})
        self._unloaded.discard(name)
        self._problems.pop(name, None)
        self._loaded = {key: value for key, value in self._loaded.items() if key[0] != name}
        self._refused = {key: value for key, value in self._refused.items() if key[0] != name}

    def _report(self, name: str, problem: str | None) -> None:
        """Log why a model, or with an empty name the repository, cannot be served; once until that changes."""
        if problem is None:
            self._problems.pop(name, None)
        elif self._problems.get(name) != problem:
            self._problems[name] = problem
            log.error(problem)

    def _list_refusals(self) -> Iterator[str]:
        """Yield a clause for each model and version of the repository that cannot be served."""
        yield from self._problems.values()
        for name in self._models.names():
            for number, reason in self._models.get(name).refusals.items():
                yield f"{name}/{number} is not served: {reason}"
