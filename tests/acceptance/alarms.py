"""Simulate rollouts of versions that are as good as the stable one, and count those that the guard rolls back.

Requests come at random, take a random time, and now and then all of them stall or fail for a moment. The guard looks at
them every 0.2 s, step by step, as the server does. The check fails if more than one of a hundred rollouts is rolled
back. The last line of the output is one JSON object.

Examples:
  python -m tests.acceptance.alarms --rollouts 1000
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from resnet import CheckFailed, cli
from serving.rollouts import guard
from serving.rollouts.guard import GuardCheck, GuardSettings, TrafficCounts
from serving.rollouts.record import RolloutSettings
from serving.rollouts.rollout import LOOK_SECONDS, SETTLE_SECONDS

MAX_TICKS = 10_000  # of a step: more than half an hour
ALLOWED = 0.01


@dataclass(frozen=True)
class SimulatedTraffic:
    """Requests of both versions, which are alike.

    Attributes:
        rate: Requests a second.
        hold_seconds: Shortest time of a step.
        agreement: Share of images with the same class.
        failures: Share of requests that fail, half of them in moments in which ten times as many do.
        compared: Images that are compared in a second.
    """

    rate: float
    hold_seconds: float
    agreement: float
    failures: float
    compared: float = 100


TRAFFIC = {
    "quiet": SimulatedTraffic(50, 10, 1.0, 0.0, 20),
    "failing": SimulatedTraffic(50, 10, 0.999, 0.01),
    "busy": SimulatedTraffic(300, 10, 0.998, 0.01),
    "patient": SimulatedTraffic(50, 30, 0.997, 0.0),
}


class SimulatedOutcome(NamedTuple):
    """How a rollout ended: the check that was broken, at which percentage; none if it succeeded."""

    broken: GuardCheck | None
    percent: float


@dataclass
class _Counts:
    """Requests of one version in one step."""

    failed: int = 0
    ns: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def add(self, ns: np.ndarray, failed: int, now: float) -> None:
        self.failed += failed
        self.ns += ns.tolist()
        self.times += [now] * len(ns)

    def count(self) -> TrafficCounts:
        recent = slice(-5000, None)
        ns, times = np.array(self.ns[recent], np.int64), np.array(self.times[recent], np.float64)
        return TrafficCounts(len(self.ns), self.failed, ns, times)


def simulate(traffic: SimulatedTraffic, seed: int) -> SimulatedOutcome:
    """Roll a version out that is as good as the stable one."""
    random, settings = np.random.default_rng(seed), RolloutSettings(hold_seconds=traffic.hold_seconds)
    canary, stable = _Counts(), _Counts()
    for percent in settings.steps:
        canary, stable, same, images = _Counts(), _Counts() if percent < 100 else stable, 0, 0
        for tick in range(1, MAX_TICKS):
            now = tick * LOOK_SECONDS
            count = random.poisson(traffic.rate * LOOK_SECONDS)
            ns = random.lognormal(0.5, 0.6, count) * 1e6
            if random.random() < 0.02:
                ns += random.uniform(0, 50e6)  # all stall
            is_bad = random.random() < 0.05
            failed = random.random(count) < traffic.failures * (10 if is_bad else 0.5)
            mine = 100 * random.random(count) < percent
            canary.add(ns[mine & ~failed].astype(np.int64), int((mine & failed).sum()), now)
            if percent < 100:
                stable.add(ns[~mine & ~failed].astype(np.int64), int((~mine & failed).sum()), now)
            compared = min(count, int(traffic.compared * LOOK_SECONDS))
            images, same = images + compared, same + random.binomial(compared, traffic.agreement)
            checks = _check(percent, now, same, images, canary.count(), stable.count(), settings)
            if broken := next((check for check in checks if check.verdict == "broken"), None):
                return SimulatedOutcome(broken, percent)
            if guard.find_verdict(checks) == "passed" and now >= settings.hold_seconds:
                break
    return SimulatedOutcome(None, 100)


def _check(
    percent: float,
    now: float,
    same: int,
    images: int,
    canary: TrafficCounts,
    stable: TrafficCounts,
    settings: GuardSettings,
) -> list[GuardCheck]:
    """Return the checks of a step, as a rollout makes them."""
    checks = [guard.check_agreement(same, images, settings)]
    if percent:
        checks.append(guard.check_requests(canary, settings))
    if percent and not (percent == 100 and now < SETTLE_SECONDS):
        checks.append(guard.check_failures(canary, stable, settings))
    if 0 < percent < 100:
        checks += [guard.check_median(canary, stable, settings), guard.check_tail(canary, stable, settings)]
    return checks


def main() -> None:
    """Simulate, and count."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.acceptance.alarms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rollouts", type=int, default=1000, help="rollouts of each kind of traffic (default: 1000)")
    rollouts = parser.parse_args().rollouts
    figures: dict[str, float] = {}
    for name, traffic in TRAFFIC.items():
        outcomes = [simulate(traffic, seed) for seed in range(rollouts)]
        broken = Counter(f"{one.broken.name} at {one.percent:g} %" for one in outcomes if one.broken)
        figures[name] = broken.total()
        print(f"{name:<8} {broken.total():>4} of {rollouts} rolled back {dict(broken) or ''}", flush=True)
    print(json.dumps(figures))
    for name, count in figures.items():
        if count > ALLOWED * rollouts:
            raise CheckFailed(
                f"{count:g} of {rollouts} rollouts of a version that is as good were rolled back ({name})"
            )


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
