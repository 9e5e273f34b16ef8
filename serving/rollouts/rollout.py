"""A rollout under way: the requests of two versions, how their answers compare, and what the guard says of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from serving.errors import FailedPrecondition
from serving.models.model import Model
from serving.models.registry import STABLE, ModelRegistry
from serving.models.split import TrafficSplit
from serving.rollouts import guard
from serving.rollouts.agreement import Agreement
from serving.rollouts.guard import GuardCheck
from serving.rollouts.images import ImageFolder
from serving.rollouts.others import ServedOthers
from serving.rollouts.record import RolloutRecord
from serving.rollouts.shadow import Shadow
from serving.rollouts.traffic import Traffic
from serving.scheduling.batcher import Batcher
from serving.scheduling.liveness import Liveness

KEPT = 10  # times as many latencies of the stable version as of the new one
LOOK_SECONDS = 0.2  # between two looks of the guard
STALL_SECONDS, STALL_BATCHES = 5.0, 10  # without a batch although there is work; the longer of both
SETTLE_SECONDS = 5.0  # of the last step, before failures in a moment may end the rollout


class Rollout:
    """A rollout that runs in this process, from `begin` to `end`.

    Attributes:
        record: What a restarted server goes on from.
        shadow: Compares the answers of the two versions, whichever gave one.
    """

    def __init__(
        self,
        record: RolloutRecord,
        models: ModelRegistry,
        is_idle: Callable[[], bool],
        images: ImageFolder | None = None,
    ) -> None:
        """Prepare a rollout, whose versions are served.

        Args:
            record: How it goes, and how far it is.
            models: The served models.
            is_idle: As in `Shadow`.
            images: As in `Agreement`.

        Raises:
            BadInput: The process may have no further thread.
        """
        self.record, self._models = record, models
        labels = models.get(record.model).versions[record.version].manifest.labels
        pair = {record.stable: record.version, record.version: record.stable}
        # Without a reserve: on a busy server, too, a rollout has to find something out.
        self.shadow = Shadow(
            Agreement(labels, images), ServedOthers(models, record.model, pair.get), is_idle, reserve=0.0
        )
        # A version that computes for the shadow answers later meanwhile, most of all the new one.
        self._traffic = Traffic([record.stable, record.version], self.shadow.overlaps)
        self._step_began = 0.0
        self._liveness, self._looked = Liveness(), 0.0  # at the new version, and when
        self._before = 0, 0  # images compared before this step, and those with the same class
        self._answered, self._failed = record.answered, record.failed  # before this step

    def begin(self, now: float) -> None:
        """Send the first requests to the new version; `now` as in `advance`."""
        self._models.follow(self.record.model, self.shadow)
        self._models.follow(self.record.model, self._traffic)
        self._begin_step(now)

    def end(self) -> None:
        """Send it none any more."""
        self._models.split(self.record.model, None)
        self._models.unfollow(self.record.model, self.shadow)
        self._models.unfollow(self.record.model, self._traffic)
        self.shadow.close()
        self.count()

    def advance(self, now: float) -> bool:
        """Begin the next step; return False if this is the last one.

        Args:
            now: The time, in seconds on any clock.
        """
        if self.record.step + 1 == len(self.record.settings.steps):
            return False
        self.count()
        self._answered, self._failed = self.record.answered, self.record.failed
        self.record.step += 1
        self._begin_step(now)
        return True

    def seconds(self, now: float) -> float:
        """Return how long the step has lasted."""
        return now - self._step_began

    def find_end(self, now: float) -> str | None:
        """Return why the rollout cannot go on, whatever the guard says; None if it can; `now` as in `advance`."""
        record, served = self.record, self._models.get(self.record.model)
        labelled = served.labels.get(STABLE, 0)
        if record.version not in served.versions:
            return f"version {record.version} is no longer served"
        if served.versions[record.version].manifest.digest != record.digest:
            return f"the files of version {record.version} have changed"
        if labelled not in (0, record.stable):
            return f"the label {STABLE!r} was moved to version {labelled}"
        if record.stable not in served.versions:
            return f"version {record.stable} is no longer served"
        if not labelled:
            return f"the label {STABLE!r} was removed"
        return self._find_stall(served.versions[record.version].batcher, now)

    def _find_stall(self, batcher: Batcher, now: float) -> str | None:
        """Return that the new version hangs: what waits for it neither fails nor is answered."""
        passed, self._looked = min(now - self._looked, LOOK_SECONDS), now
        self._liveness = self._liveness.look(batcher.answered, batcher.is_busy, passed)
        seconds = self._liveness.silent
        if seconds <= max(STALL_SECONDS, STALL_BATCHES * batcher.expected_ns / 1e9):
            return None
        return f"version {self.record.version} has computed nothing for {seconds:.0f} s, although requests wait"

    def check(self, now: float) -> list[GuardCheck]:
        """Return what the guard says of this step; `now` as in `advance`."""
        record, settings = self.record, self.record.settings
        counts, (images, same) = self.shadow.agreement.counts(), self._before
        checks = [guard.check_agreement(counts.all_same - same, counts.all_images - images, settings)]
        if record.percent:
            canary, stable = self._traffic.count(record.version), self._traffic.count(record.stable)
            failures = guard.check_failures(canary, stable, settings)
            is_early = self.seconds(now) < min(SETTLE_SECONDS, settings.hold_seconds)
            if record.percent == 100 and failures.verdict == "broken" and is_early:
                # The stable version has no requests at the same time, which would have failed in the same moments.
                failures = failures._replace(verdict="undecided")
            checks += [guard.check_requests(canary, settings), failures]
            if record.percent < 100:
                canary, stable = guard.share_window(canary, stable)
                checks += [guard.check_median(canary, stable, settings), guard.check_tail(canary, stable, settings)]
        return checks

    def count(self) -> None:
        """Record how many requests the new version has answered."""
        canary = self._traffic.count(self.record.version)
        self.record.answered, self.record.failed = self._answered + canary.answered, self._failed + canary.failed

    def _begin_step(self, now: float) -> None:
        record = self.record
        self._step_began = now
        counts = self.shadow.agreement.counts()
        self._before = counts.all_images, counts.all_same
        self._traffic.forget(record.version)
        if record.percent < 100:  # the last step is compared with the one before
            self._traffic.forget(record.stable, min(1.0, KEPT * record.percent / 100))
        split = TrafficSplit(record.stable, record.version, record.percent, record.settings.header, record.salt)
        self._models.split(record.model, split)


def check_pair(model: Model, stable: Model) -> None:
    """Check that the answers of two versions can be compared.

    Raises:
        FailedPrecondition: They take other images, or have other classes.
    """
    for what, mine, others in (
        ("takes images of another size or colours", model.image_shape, stable.image_shape),
        ("has other classes", model.manifest.labels, stable.manifest.labels),
    ):
        if mine != others:
            raise FailedPrecondition(
                f"version {model.version} of model {model.name!r} {what} than version {stable.version}; "
                "their answers cannot be compared"
            )


def list_open(checks: Sequence[GuardCheck]) -> str:
    """Return what is not decided yet, in one clause; empty if all is."""
    return "; ".join(f"{check.name}: {check.detail}" for check in checks if check.verdict == "undecided")
