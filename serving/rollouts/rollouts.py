"""The rollouts of a server: started on request, watched by the guard, and recorded in the repository until they end."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from export import repository
from resnet import BadInput
from serving.errors import FailedPrecondition, NotFound, ServingError, Unavailable
from serving.models.model import Model
from serving.models.registry import STABLE, ModelRegistry
from serving.models.watcher import Watcher
from serving.rollouts import record as records
from serving.rollouts.guard import GuardCheck, find_verdict
from serving.rollouts.images import ImageFolder
from serving.rollouts.record import FolderLock, RolloutRecord, RolloutSettings, State
from serving.rollouts.rollout import LOOK_SECONDS, Rollout, check_pair, list_open
from serving.rollouts.shadow import Shadow
from serving.threads import WorkerPool, start_vital

WORST = "; the requests that differ most: "

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RolloutStatus:
    """A rollout of this server.

    Attributes:
        record: How far it is, or how it ended.
        step_seconds: How long the step has lasted.
        checks: What the guard last said.
        shadow: Compares the answers; None if the rollout ended before this server began.
        waits_for: What it waits for; empty once it has ended.
    """

    record: RolloutRecord
    step_seconds: float
    checks: tuple[GuardCheck, ...]
    shadow: Shadow | None
    waits_for: str


class _Running:
    """A rollout with what it holds."""

    def __init__(self, rollout: Rollout, folder: Path, lock: FolderLock) -> None:
        self.rollout, self.folder, self.lock = rollout, folder, lock
        self.checks: tuple[GuardCheck, ...] = ()
        self.is_finishing = False


class Rollouts:
    """The rollouts of a server; one at a time for a model."""

    def __init__(
        self,
        models: ModelRegistry,
        watcher: Watcher,
        is_idle: Callable[[], bool],
        keep_images: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch nothing yet: `start` does.

        Args:
            models: The served models.
            watcher: Loads versions, and sets labels.
            is_idle: As in `Shadow`.
            keep_images: Folder for the images that are answered most differently; None keeps none.
            clock: Returns the time by which steps last, in seconds.

        Raises:
            BadInput: The process may have no further thread.
        """
        self._clock = clock
        self._models, self._watcher, self._is_idle, self._keep_images = models, watcher, is_idle, keep_images
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._ended: dict[str, RolloutStatus] = {}
        self._starting: set[str] = set()  # models of which a version is being loaded
        self._wake, self._closed = threading.Event(), False
        self._finisher = WorkerPool(1, "finish")  # setting a label waits while a version is loaded

    def start(self) -> None:
        """Watch the rollouts on a thread of its own.

        Raises:
            BadInput: The process may have no further thread.
        """
        start_vital(self._run, "rollouts")

    def resume(self) -> None:
        """Go on with the rollouts that a process left in order, and roll back those of one that did not end so.

        Raises:
            BadInput: The process may have no further thread.
        """
        for name in self._models.names():
            with suppress(ServingError, OSError):
                folder, _ = self._watcher.find_folder(name)
                self._resume(name, folder)

    def close(self) -> None:
        """End in order: rollouts go on when the server is started again."""
        with self._lock:
            self._closed = True
            for running in self._running.values():
                running.rollout.record.state = "paused"
                running.rollout.count()
                self._write(running)
                running.rollout.shadow.close()
                running.lock.release()
            self._running.clear()
        self._wake.set()

    def look(self) -> None:
        """Ask the guard about each rollout once, and do what it says."""
        with self._lock:
            for name, running in list(self._running.items()):
                if not running.is_finishing:
                    self._look(name)

    def roll_out(self, name: str, version: int, settings: RolloutSettings) -> None:
        """Start to roll a version out.

        Raises:
            ServingError: There is no such version, it cannot be loaded or compared, it is stable already, a rollout of
                the model runs, or the repository cannot be written.
        """
        with self._claim(name):
            folder, _ = self._watcher.find_folder(name)
            lock = self._lock_folder(folder)
            try:
                stable = self._find_stable(name)
                if version == stable.version:
                    raise FailedPrecondition(
                        f"version {version} of model {name!r} answers all requests already; give the label {STABLE!r} "
                        "to the version that it is to replace"
                    )
                model = self._watcher.hold(name, version)
                record = RolloutRecord(
                    model=name,
                    version=version,
                    digest=model.manifest.digest,
                    stable=stable.version,
                    settings=settings,
                    salt=secrets.token_hex(16),
                    started=time.time(),
                )
                try:
                    check_pair(model, stable)
                    self._write_first(record, folder)
                    self._label_first(record, folder)
                    self._begin(record, folder, lock)
                except BaseException:
                    self._watcher.release(name, version)
                    raise
            except BaseException:
                lock.release()
                raise
        log.info("%s/%d %s", name, version, record.describe())
        self._wake.set()

    def stop(self, name: str) -> None:
        """Roll the rollout of a model back.

        Raises:
            NotFound: None runs.
        """
        with self._lock:
            if name not in self._running or self._running[name].is_finishing:
                raise NotFound(f"no rollout of model {name!r} runs")
            self._roll_back(name, "by request")

    def find(self, name: str) -> RolloutStatus | None:
        """Return the running or last rollout of a model."""
        with self._lock:
            running = self._running.get(name)
            if running is None:
                return self._ended.get(name)
            rollout, now = running.rollout, self._clock()
            rollout.count()
            seconds, hold = rollout.seconds(now), rollout.record.settings.hold_seconds
            waits_for = list_open(running.checks) or f"the step lasts {hold:g} s"
            return RolloutStatus(rollout.record, seconds, running.checks, rollout.shadow, waits_for)

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(LOOK_SECONDS if self._running else None)
            self._wake.clear()
            try:
                self.look()
            except Exception:  # the next look may succeed
                log.exception("a look at the rollouts failed")

    def _look(self, name: str) -> None:
        """Ask the guard about a rollout, and do what it says. The lock is held."""
        running, now = self._running[name], self._clock()
        rollout, record = running.rollout, running.rollout.record
        if reason := rollout.find_end(now):
            self._roll_back(name, reason)
            return
        running.checks = tuple(rollout.check(now))
        match find_verdict(running.checks):
            case "broken":
                broken = next(check for check in running.checks if check.verdict == "broken")
                self._roll_back(name, f"{broken.name}: {broken.detail}")
            case "passed" if rollout.seconds(now) >= record.settings.hold_seconds:
                if rollout.advance(now):
                    self._write(running)
                    self._remark(record)
                    log.info("%s/%d %s", name, record.version, record.describe())
                else:
                    running.is_finishing = True
                    self._finisher.submit(self._finish, name, running)

    def _begin(self, record: RolloutRecord, folder: Path, lock: FolderLock) -> None:
        """Start a rollout whose versions are served.

        Raises:
            BadInput: The process may have no further thread.
            Unavailable: The server ends; nothing of the rollout stays.
        """
        rollout = Rollout(record, self._models, self._is_idle, ImageFolder.open(self._keep_images, record.model))
        with self._lock:
            if not self._closed:
                rollout.begin(self._clock())
                self._running[record.model] = _Running(rollout, folder, lock)
                self._remark(record)
                return
        rollout.shadow.close()
        (folder / records.NAME).unlink(missing_ok=True)
        raise Unavailable("the server is shutting down")

    def _finish(self, name: str, running: _Running) -> None:
        """Make the new version the stable one."""
        record, problem = running.rollout.record, ""
        try:
            # On the disk, where somebody may have moved it since the last scan.
            if repository.labels(running.folder).get(STABLE) != record.stable:
                problem = f"the label {STABLE!r} was moved by hand"
            else:
                self._watcher.label(name, STABLE, record.version)
        except (ServingError, OSError) as error:
            problem = str(error)
        with self._lock:
            if self._running.get(name) is not running:
                return  # the server ends
            if problem:
                self._roll_back(name, problem)
                return
            self._end(name, "done")
        log.info("%s/%d is %s", name, record.version, record.describe())

    def _roll_back(self, name: str, reason: str) -> None:
        """Send all requests to the stable version. The lock is held."""
        running = self._running[name]
        self._models.split(name, None)  # at once; all else can wait
        record, worst = running.rollout.record, running.rollout.shadow.agreement.counts().worst
        differing = [one for one in worst if one.answer != one.other_answer]
        if differing:
            reason += f"{WORST}{', '.join(map(str, differing))}"
        self._end(name, "rolled_back", reason)
        log.error("%s/%d was %s", name, record.version, record.describe())

    def _end(self, name: str, state: State, reason: str = "") -> None:
        """Record how a rollout ended. The lock is held."""
        running = self._running.pop(name)
        rollout, record = running.rollout, running.rollout.record
        seconds = rollout.seconds(self._clock())
        rollout.end()
        record.end(state, reason)
        self._ended[name] = RolloutStatus(record, seconds, running.checks, rollout.shadow, "")
        self._write(running)
        self._remark(record)
        running.lock.release()
        self._watcher.release(name, record.version)
        if record.state == "rolled_back":  # it may hang, which is no reason to end the server
            self._finisher.submit(self._watcher.refresh, name)

    def _resume(self, name: str, folder: Path) -> None:
        """Go on with the rollout that a server left in order, or record that it ended with the server."""
        try:
            record = records.read(folder)
        except (OSError, msgspec.DecodeError, BadInput) as error:
            log.warning("%s is no record of a rollout (%s)", folder / records.NAME, error)
            return
        if record is None or record.model != name:
            return
        try:
            lock = FolderLock(folder)
        except OSError:
            return  # another server goes on with it
        reason, is_open = "", record.state in ("running", "paused")
        if is_open and self._models.get(name).labels.get(STABLE) == record.version:
            record.end("done")  # the server ended just after it had moved the label
        elif record.state == "paused":
            held = False
            try:
                model, held = self._watcher.hold(name, record.version), True
                if model.manifest.digest != record.digest:
                    raise FailedPrecondition(f"the files of version {record.version} have changed")
                check_pair(model, self._find_stable(name))
                record.state = "running"
                self._write_first(record, folder)  # as if it began now: if the server is killed, the rollout ends
                self._begin(record, folder, lock)
            except ServingError as error:
                if held:
                    self._watcher.release(name, record.version)
                reason = f"it could not go on after a restart: {error}"
            else:
                log.info("%s/%d %s", name, record.version, record.describe())
                return
        elif record.state == "running":
            reason = "the server ended without notice"
        if reason:
            record.end("rolled_back", reason)
            log.error("%s/%d was %s", name, record.version, record.describe())
            with suppress(OSError):
                record.write(folder)
        lock.release()
        self._ended[name] = RolloutStatus(record, 0.0, (), None, "")
        self._remark(record)

    @contextmanager
    def _claim(self, name: str) -> Iterator[None]:
        """Keep another rollout of a model from starting, for the length of a `with` block.

        Raises:
            FailedPrecondition: One runs, or is being started.
            Unavailable: The server ends.
        """
        with self._lock:
            if self._closed:
                raise Unavailable("the server is shutting down")
            if name in self._running or name in self._starting:
                raise FailedPrecondition(f"a rollout of model {name!r} runs; `resnet rollout {name} --stop` ends it")
            self._starting.add(name)
        try:
            yield
        finally:
            self._starting.discard(name)

    def _find_stable(self, name: str) -> Model:
        """Return the version that answers requests that name none."""
        served = self._models.get(name)
        if not served.versions:
            raise FailedPrecondition(f"no version of model {name!r} is served, which another could replace")
        return served.versions[served.default]

    def _lock_folder(self, folder: Path) -> FolderLock:
        try:
            return FolderLock(folder)
        except OSError as error:
            reason = "another server rolls a version out" if isinstance(error, BlockingIOError) else error.strerror
            raise FailedPrecondition(f"no rollout can start in {folder}: {reason}") from None

    def _write_first(self, record: RolloutRecord, folder: Path) -> None:
        try:
            record.write(folder)
        except OSError as error:
            raise FailedPrecondition(
                f"the rollout cannot be recorded in {folder} ({error.strerror}); the server must be able to write there"
            ) from None

    def _label_first(self, record: RolloutRecord, folder: Path) -> None:
        """Label the stable version; if that fails, nothing of the rollout stays."""
        try:
            self._watcher.label(record.model, STABLE, record.stable)
        except ServingError:
            (folder / records.NAME).unlink(missing_ok=True)
            raise

    def _write(self, running: _Running) -> None:
        """Write the record; a rollout goes on without, as its folder may be gone."""
        try:
            running.rollout.record.write(running.folder)
        except OSError as error:
            log.error("the rollout cannot be recorded in %s (%s)", running.folder, error.strerror)

    def _remark(self, record: RolloutRecord) -> None:
        self._models.remark(record.model, {record.version: record.describe()})
