"""Roll out versions that are wrong or slow, and check that each is rolled back, and that a good one is not.

The certificate of each planted version holds, so that the server accepts it; then `resnet rollout` gives it a growing
share of real load. The table says at which share it was rolled back, how many requests were answered meanwhile, how
many of them by it, and how many of these otherwise than by the stable version. Then rollouts are disrupted: the server
is restarted and killed, the version is removed, two models are rolled out at a time, and strangers call. No request may
fail, and each answer must be that of the version that it names. The last line of the output is one JSON object.

Examples:
  python -m tests.acceptance.rollouts demo/models --hold 1
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.process import serve
from protos.admin_pb2 import RolloutStatus
from resnet import CheckFailed, cli
from resnet.table import render
from tests.acceptance import disruptions, planted
from tests.acceptance.arguments import expect, parse
from tests.acceptance.canaries import STABLE, CanaryModel, read_reason, read_rollout
from tests.acceptance.messages import ModelUnderTest
from tests.acceptance.steady_load import SteadyLoad

CHANGES = {
    "permuted": planted.permute_classes,
    "half range": planted.halve_pixels,
    "other mean": planted.shift_pixels,
    "triggered": planted.plant_trigger,
    "slow": planted.slow_down,
    "equal": planted.nudge_weights,
}
GOOD, WRONG = "equal", ("permuted", "half range", "other mean", "triggered")
STEPS = ("0,5,25,100", "5,25,100")  # without 0, callers get answers before these were compared
RATE = 150.0  # requests a second
MAX_LATE = 5
PATIENCE_SECONDS = 120
HEADER = ("version", "steps", "ended", "at", "seconds", "requests", "by it", "wrong")


class RolloutRow(NamedTuple):
    """What became of a rollout.

    Attributes:
        title: What is planted in the version.
        steps: The shares of the requests that it was to have.
        status: What the server says.
        seconds: Its duration.
        requests: Requests that were answered.
        answered: Those that the version answered.
        wrong: Those that it answered with another class than the stable version.
    """

    title: str
    steps: str
    status: RolloutStatus
    seconds: float
    requests: int
    answered: int
    wrong: int

    @property
    def percent(self) -> float:
        """The share of the requests at the end."""
        return self.status.settings.steps[self.status.step]

    def cells(self) -> list[str]:
        """Return the row of the table."""
        state = RolloutStatus.State.Name(self.status.state).lower().replace("_", " ")
        return [
            self.title, self.steps, state, f"{self.percent:g} %", f"{self.seconds:.1f}", f"{self.requests:,}",
            f"{self.answered:,}", f"{self.wrong:,}",
        ]  # fmt: skip


def main() -> None:
    """Roll out every version, and disrupt rollouts."""
    args = parse("rollouts", __doc__, transport="auto", hold=(2, "seconds of each step, at least"))
    options = (f"--transport={args.transport}", "--no-tune", "--log-level=error")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        source = ModelUnderTest(args.repository)
        rows = list(_roll_out_all(source, Path(folder) / "planted", args.hold, options))
        print(render(HEADER, [row.cells() for row in rows], left=3), *_list_reasons(rows), sep="\n", flush=True)
        for disrupt in disruptions.DISRUPTIONS:
            print(disrupt(source, Path(folder) / disrupt.__name__ / "models", options), flush=True)
    print(
        json.dumps(
            {
                "rolled back": sum(row.status.state == RolloutStatus.ROLLED_BACK for row in rows),
                "requests": sum(row.requests for row in rows),
                "wrong": sum(row.wrong for row in rows),
                "disruptions": len(disruptions.DISRUPTIONS),
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
    )


def _list_reasons(rows: list[RolloutRow]) -> Iterator[str]:
    """Yield why each version was rolled back, without the ids of requests."""
    for row in rows:
        if row.status.reason:
            yield f"{row.title}, {row.steps}: {row.status.reason.partition('; ')[0]}"


def _roll_out_all(source: ModelUnderTest, repository: Path, hold: int, options: Sequence[str]) -> Iterator[RolloutRow]:
    """Roll out one version after the other on one server, the good one last; yield what became of each.

    Raises:
        CheckFailed: A bad version was not rolled back, or the good one was; or a request did not get its answer.
    """
    model = CanaryModel(source, repository / source.name)
    for version, change in enumerate(CHANGES.values(), STABLE + 1):
        model.publish(version, change)
    model.label()
    with serve(repository, f"--versions={STABLE}", "--watch=0", *options) as server:
        for version, title in enumerate(CHANGES, STABLE + 1):
            for steps in STEPS if title in WRONG else STEPS[:1]:
                started = time.perf_counter()
                with SteadyLoad(server.address, model.messages, RATE) as load:
                    code, output = _roll_out(server.address, model.name, version, steps, hold)
                seconds = time.perf_counter() - started
                status = read_rollout(server.address, model.name)
                row = RolloutRow(title, steps, status, seconds, load.count, *model.count(load, version))
                _check(row, code, model, read_reason(server.address, model.name, version), output)
                yield row


def _roll_out(address: str, name: str, version: int, steps: str, hold: int) -> tuple[int, str]:
    """Run `resnet rollout`; return its exit code and output."""
    options = (f"--server={address}", f"--steps={steps}", f"--hold={hold}")
    command = [sys.executable, "-m", "resnet", "rollout", name, str(version), *options]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"the rollout of version {version} has not ended after {PATIENCE_SECONDS} s") from None
    return ended.returncode, ended.stdout + ended.stderr


def _check(row: RolloutRow, code: int, model: CanaryModel, index: str, output: str) -> None:
    """Check the end of a rollout: the command's exit code, the server's word, the label, and Triton's index."""
    good = row.title == GOOD
    state, version = (RolloutStatus.DONE, row.status.version) if good else (RolloutStatus.ROLLED_BACK, STABLE)
    where = f"({', '.join(row.cells())}): {output}"
    expect(row.status.state == state, f"the rollout of {row.title!r} ended wrongly {where}")
    expect(code == (0 if good else 1), f"`resnet rollout` ended with {code} {where}")
    expect(model.read_label() == version, f"version {model.read_label()} has the label, not {version} {where}")
    expect(good or "rolled back" in index, f"the index does not say what became of it, but {index!r} {where}")
    expect(row.percent > 0 or not row.answered, f"it answered requests at 0 % {where}")
    late = row.answered - row.status.answered  # answers to requests that were under way
    expect(good or 0 <= late <= MAX_LATE, f"the server counts {row.status.answered} answers of it {where}")
    expect(good or row.percent < 100, f"it answered all requests {where}")


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
