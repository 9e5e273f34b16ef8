"""The record of a rollout, in the folder of its model: what a restarted server goes on from."""

from __future__ import annotations

import fcntl
import os
import re
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec

from export import files, repository
from resnet import BadInput
from serving.errors import REQUEST_ID
from serving.rollouts.guard import GuardSettings

NAME = repository.ROLLOUT

HEADER = re.compile("[a-z0-9_.-]{1,100}")
MAX_STEPS = 100
MAX_SALT = 64  # of a key of BLAKE2b
LARGEST = 2**62

State = Literal["running", "paused", "done", "rolled_back"]


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(GuardSettings):
    """How a version is rolled out.

    Attributes:
        steps: Shares of the requests in percent, ascending; the last is 100.
        hold_seconds: Shortest time of a step.
        header: Name of the header whose value decides which version answers.
    """

    steps: tuple[float, ...] = (0.0, 1.0, 5.0, 25.0, 100.0)
    hold_seconds: float = 60.0
    header: str = REQUEST_ID

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            BadInput: One is out of range, or the header cannot be one.
        """
        steps = self.steps
        if len(steps) > MAX_STEPS:
            raise BadInput(f"a rollout has at most {MAX_STEPS} steps, not {len(steps):,}")
        if not steps or steps[-1] != 100 or not all(0 <= low < high for low, high in pairwise(steps)):
            given = ",".join(f"{step:g}" for step in steps)
            raise BadInput(f"the steps are percentages that grow from 0 or more to 100, as in 1,5,25,100; not {given}")
        if not HEADER.fullmatch(self.header):
            raise BadInput(
                f"{self.header[:100]!r} is no name of a header, such as x-user; gRPC allows a-z, 0-9, _, . and -"
            )
        for name, low, high, form in (
            ("hold_seconds", 0, 1e6, "g"),
            (
                "min_agreement",
                0.01,
                0.9999,
                ".2%",
            ),  # no number of images shows more; less is meant as a share, not percent
            ("max_failures", 0, 1, ".1%"),
            ("max_slowdown", 1, 1e3, "g"),
            ("min_requests", 1, 1e9, "g"),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise BadInput(f"{name} must be from {low:{form}} to {high:{form}}, not {value:{form}}")


class RolloutRecord(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A rollout.

    Attributes:
        model: Name of the model.
        version: Number of the new version.
        digest: Hash of its manifest: other files under its number are another version.
        stable: Number of the stable version when it began.
        settings: How it is rolled out.
        salt: As in `TrafficSplit`.
        step: Index of the current or last step.
        state: `paused` by a server that ended in order.
        reason: Why it was rolled back.
        answered: Requests that the new version answered.
        failed: Requests that it failed or refused.
        started: In seconds since 1970.
        ended: In seconds since 1970; 0 while it lasts.
    """

    model: str
    version: int
    digest: str
    stable: int
    settings: RolloutSettings
    salt: str = ""
    step: int = 0
    state: State = "running"
    reason: str = ""
    answered: int = 0
    failed: int = 0
    started: float = 0.0
    ended: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no server has written.

        Raises:
            ValueError: A value is out of range.
        """
        in_range = all(0 <= number < LARGEST for number in (self.answered, self.failed, self.started, self.ended))
        is_pair = 0 < self.version < LARGEST and 0 < self.stable < LARGEST and self.version != self.stable
        is_text = len(self.salt) <= MAX_SALT and self.salt.isprintable() and self.reason.isprintable()
        if not (in_range and is_pair and is_text and 0 <= self.step < len(self.settings.steps)):
            raise ValueError("a value is out of range")

    @property
    def percent(self) -> float:
        """Share of the requests that the new version answers in this step."""
        return self.settings.steps[self.step]

    def end(self, state: State, reason: str = "") -> None:
        """Note how it ended, and when; of the reason what a line may hold, as class names and errors may have more."""
        self.state, self.ended = state, time.time()
        self.reason = "".join(sign if sign.isprintable() else " " for sign in reason)

    def describe(self) -> str:
        """Return what becomes of the rollout, in one clause."""
        match self.state:
            case "done":
                return f"rolled out, in place of version {self.stable}"
            case "rolled_back":
                return f"rolled back at {self.percent:g} %: {self.reason}"
            case _:
                return f"is rolled out, at {self.percent:g} % beside version {self.stable}"

    def write(self, model: Path) -> None:
        """Write it to the folder of its model, in one step.

        Raises:
            OSError: It cannot be written.
        """
        files.write(model / NAME, msgspec.json.format(msgspec.json.encode(self), indent=2))


def read(model: Path) -> RolloutRecord | None:
    """Return the record in the folder of a model; None without one.

    Raises:
        OSError: It cannot be read.
        msgspec.DecodeError: It is no record.
    """
    try:
        content = files.read(model / NAME)
    except FileNotFoundError:
        return None
    return msgspec.json.decode(content, type=RolloutRecord)


class FolderLock:
    """Says that a server rolls out a version in a folder, until `release` or the end of the process."""

    def __init__(self, model: Path) -> None:
        """Lock the folder of a model; on a file system without locks, this succeeds for everybody.

        Raises:
            BlockingIOError: Another server holds the lock.
            OSError: The folder is gone.
        """
        self._descriptor = os.open(model, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise
        except OSError:
            pass

    def release(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)
