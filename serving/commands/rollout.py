"""Give a new version of a model a growing share of the requests, as long as it does as well as the stable version.

Requests that name no version, or the label `stable`, are split between the two versions. At each step the server holds
the new version against the stable one: same classes, failures, latency. What is worse is rolled back at once; after the
last step the label `stable` moves. The exit code is 0 then, and 1 after a rollback. Needs an administrator's token.

Examples:
  resnet rollout digits 2
  resnet rollout digits 2 --steps 0,10,100 --hold 10m --by x-user
  resnet rollout digits --stop
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import MISSING, dataclass

from protos import admin_pb2 as pb
from resnet import BadInput, CheckFailed
from resnet.options import add_options, check, option, read
from serving.client.access import AccessOptions, to_bad_input
from serving.client.admin import AdminClient
from serving.client.client import DEFAULT_SERVER
from serving.client.screen import describe_outcome, describe_step, printable, render_worst
from serving.errors import DeadlineExceeded, ServingError, Unavailable

POLL_SECONDS = 0.5
REPEAT_SECONDS = 30.0  # until the figures of what is waited for are printed again
GONE_SECONDS = 60.0  # a server takes so long to come back at most
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
DURATION = re.compile(r"(\d{1,9}(?:\.\d+)?)([smh]?)", re.ASCII)
FIGURE = re.compile(r"\d[\d.,]*")


@dataclass(frozen=True, kw_only=True)
class RolloutArguments:
    """What `resnet rollout` asks; of the settings only those that are given are sent."""

    model: str = option(MISSING, "model of the server", metavar="NAME")
    version: int | None = option(None, "version to roll out", low=1, metavar="VERSION", positional=True)
    stop: bool = option(False, "roll the running rollout back")
    detach: bool = option(False, "start the rollout, and do not wait for its end")
    server: str = option(DEFAULT_SERVER, "server address, or unix:PATH", metavar="HOST:PORT")
    steps: tuple[float, ...] = option(
        (),
        "shares of the requests in percent, ascending to 100; 0 compares answers without sending any "
        "(default: 0,1,5,25,100)",
        high=100,
        group="settings",
    )
    hold: str = option("", "least time of a step, such as 30s, 10m or 1h (default: 60s)", metavar="TIME")
    by: str = option("", "header whose value decides which version answers (default: x-request-id)", metavar="HEADER")
    min_agreement: float | None = option(
        None,
        "least share of images with the same class, in percent (default: 99)",
        low=1,
        high=99.99,
        metavar="PERCENT",
    )
    max_failures: float | None = option(
        None,
        "how many points more of its requests may fail than of the stable version's (default: 1)",
        high=100,
        metavar="POINTS",
    )
    max_slowdown: float | None = option(
        None, "how many times as long requests may take, at the median and at p99 (default: 1.5)", low=1, high=1000
    )
    min_requests: int | None = option(
        None, "least number of requests that the version answers at each step above 0 (default: 50)", low=1
    )

    def __post_init__(self) -> None:
        check(self)
        if self.stop == (self.version is not None):
            raise BadInput("give either the VERSION to roll out, or --stop")
        self.to_settings()

    def to_settings(self) -> pb.RolloutSettings:
        """Return the settings that were given.

        Raises:
            BadInput: `hold` is no duration.
        """
        return pb.RolloutSettings(
            steps=self.steps,
            hold_seconds=parse_duration(self.hold) if self.hold else None,
            header=self.by,
            min_agreement=self.min_agreement,
            max_failures=self.max_failures,
            max_slowdown=self.max_slowdown,
            min_requests=self.min_requests,
        )


@dataclass(frozen=True, kw_only=True)
class RolloutCommand(AccessOptions, RolloutArguments):
    """The options of `resnet rollout`."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet rollout`."""
    add_options(parser, RolloutCommand)


def run(args: argparse.Namespace) -> None:
    """Start a rollout and follow it to its end, or roll one back."""
    options = read(args, RolloutCommand)
    with AdminClient(options.server, options.load()) as admin:
        try:
            if options.version is None:
                admin.stop_rollout(options.model)
                print(f"the rollout of {options.model} is rolled back")
            else:
                roll_out(admin, options, options.version)
        except ServingError as error:
            raise to_bad_input(error, options.server) from None


def roll_out(admin: AdminClient, options: RolloutCommand, version: int) -> None:
    """Start a rollout and follow it to its end, unless that is not asked for.

    Raises:
        CheckFailed: It was rolled back.
    """
    name = f"{options.model}/{version}"
    try:
        print(f"the server loads {name}, unless it serves it already", flush=True)
        admin.start_rollout(options.model, version, options.to_settings())
        if options.detach:
            print(f"the rollout of {name} runs; `resnet status` shows it")
            return
        rollout = follow(admin, options, version)
    except KeyboardInterrupt:
        stop = f"resnet rollout {options.model} --stop --server {options.server}"
        print(f"\nthe rollout of {name} goes on; `{stop}` rolls it back", file=sys.stderr)
        raise
    if rollout.state == pb.RolloutStatus.DONE:
        print(f"{name} is the stable version; {describe_outcome(rollout)}")
        return
    if worst := rollout.shadow.agreement.worst:
        print(render_worst(options.model, worst))
    raise CheckFailed(printable(f"{name} was rolled back at {describe_step(rollout)}: {rollout.reason}"))


def follow(admin: AdminClient, options: RolloutCommand, version: int) -> pb.RolloutStatus:
    """Print each step of a rollout, and each change of what it waits for; return its end.

    Raises:
        CheckFailed: Another rollout took its place.
        Unavailable: The server was gone for too long.
    """
    said, said_at, gone_since = None, 0.0, None
    while True:
        try:
            rollout = find_rollout(admin.read_status(options.model), version)
        except (Unavailable, DeadlineExceeded):
            gone_since = gone_since or time.monotonic()
            if time.monotonic() - gone_since >= GONE_SECONDS:
                raise
            line, kind = f"no server answers at {options.server}; waiting for it", ""
        else:
            if rollout.state != pb.RolloutStatus.RUNNING:
                return rollout
            gone_since = None
            line = ": ".join(part for part in (describe_step(rollout), rollout.reason) if part)
            kind = f"{rollout.step} {FIGURE.sub('', rollout.reason)}"  # the figures change all the time
        if kind != said or (kind and time.monotonic() - said_at >= REPEAT_SECONDS):
            print(printable(line), flush=True)
            said_at = time.monotonic()
        said = kind
        time.sleep(POLL_SECONDS)


def find_rollout(status: pb.GetStatusResponse, version: int) -> pb.RolloutStatus:
    """Return the rollout of a version.

    Raises:
        CheckFailed: The server has none, or of another version.
    """
    (model,) = status.models
    if not model.HasField("rollout"):
        raise CheckFailed(f"the server knows no rollout of {model.name} any more; `resnet status` shows what it serves")
    if model.rollout.version != version:
        raise CheckFailed(
            f"a rollout of {model.name}/{model.rollout.version} took the place of that of {model.name}/{version}"
        )
    return model.rollout


def parse_duration(text: str) -> float:
    """Return a duration in seconds, which a text such as `30`, `30s`, `10m` or `1h` gives.

    Raises:
        BadInput: The text is no duration.
    """
    match = DURATION.fullmatch(text)
    if not match:
        raise BadInput(f"--hold must be a number of seconds, or a time such as 30s, 10m or 1h, not {text[:60]!r}")
    return float(match[1]) * UNITS[match[2]]
