"""Show what a server runs: versions, traffic, shadows and rollouts, on one screen.

Rates and latencies are those of the last second, or with --watch those since the last screen.

With --health it prints nothing, and its exit code is 0 if the server takes requests; that needs no token.

Examples:
  resnet status
  resnet status 10.0.0.1:8001 --watch
  resnet status --json --model digits
  resnet status --health
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from protos import admin_pb2 as pb
from protos.record import to_record
from resnet import BadInput, CheckFailed
from resnet.options import AMOUNT, add_options, option, read
from serving.client.access import AccessOptions, to_bad_input
from serving.client.admin import AdminClient
from serving.client.client import DEFAULT_SERVER
from serving.client.screen import render_status
from serving.client.traffic import VersionTraffic, measure
from serving.errors import DeadlineExceeded, ServingError, Unavailable

INTERVAL_SECONDS = 1.0  # of the rates, at first
WATCH_SECONDS = 2.0
CLEAR = "\x1b[H\x1b[2J"

TrafficTable = Mapping[tuple[str, int], VersionTraffic]


@dataclass(frozen=True, kw_only=True)
class StatusArguments:
    """What `resnet status` asks, except for `--watch`, whose value may be left out."""

    server: str = option(DEFAULT_SERVER, "HOST:PORT or unix:PATH", metavar="SERVER", positional=True)
    model: str = option("", "model to show (default: all)", metavar="NAME")
    json: bool = option(False, "print one JSON object; with --watch, one line each")
    health: bool = option(False, "only check that the server takes requests, as a container's health check does")


@dataclass(frozen=True, kw_only=True)
class StatusCommand(AccessOptions, StatusArguments):
    """The options of `resnet status`, except for `--watch`."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet status`."""
    parser.add_argument(
        "--watch",
        nargs="?",
        type=AMOUNT,
        const=WATCH_SECONDS,
        metavar="SECONDS",
        help=f"show it again every so many seconds, until Ctrl-C (default: {WATCH_SECONDS:g}); write it after SERVER",
    )
    add_options(parser, StatusCommand)


def run(args: argparse.Namespace) -> None:
    """Print the status once, or again and again."""
    options = read(args, StatusCommand)
    if options.health and (options.json or options.model or args.watch is not None):
        raise BadInput("--health prints nothing; leave out --json, --model and --watch")
    with AdminClient(options.server, options.load()) as admin:
        try:
            if options.health:
                check_health(admin, options.server)
            elif args.watch is None:
                show_once(admin, options)
            else:
                show_always(admin, options, args.watch)
        except ServingError as error:
            raise to_bad_input(error, options.server) from None
        except KeyboardInterrupt:
            if args.watch is None:
                raise


def check_health(admin: AdminClient, server: str) -> None:
    """Raise `CheckFailed` unless the server takes requests."""
    if not admin.is_serving():
        raise CheckFailed(f"the server at {server} takes no requests")


def show_once(admin: AdminClient, options: StatusCommand) -> None:
    """Print the status, with the traffic of one interval."""
    before = admin.read_status(options.model)
    time.sleep(INTERVAL_SECONDS)
    after = admin.read_status(options.model)
    print(render(options, after, compare(before, after)))


def show_always(admin: AdminClient, options: StatusCommand, seconds: float) -> None:
    """Print the status every so many seconds; a server that is gone is waited for."""
    before = None
    while True:
        pause = seconds if before else min(seconds, INTERVAL_SECONDS)
        try:
            after = admin.read_status(options.model)
        except (Unavailable, DeadlineExceeded) as error:
            show(options, render_gone(options, error))
        else:
            if before:
                show(options, render(options, after, compare(before, after)))
            before = after
        time.sleep(pause)


def compare(before: pb.GetStatusResponse, after: pb.GetStatusResponse) -> TrafficTable:
    """Return the traffic between two statuses, or since the server's start if that was meanwhile."""
    seconds = after.uptime_seconds - before.uptime_seconds
    if seconds < 0:
        before, seconds = pb.GetStatusResponse(), after.uptime_seconds
    earlier = {(model.name, version.version): version for model in before.models for version in model.versions}
    return {
        key: measure(earlier.get(key), version, seconds)
        for model in after.models
        for version in model.versions
        if (key := (model.name, version.version))
    }


def render(options: StatusCommand, status: pb.GetStatusResponse, traffic: TrafficTable) -> str:
    """Return a status as text or JSON."""
    if not options.json:
        return render_status(options.server, status, traffic)
    record = {"server": options.server, **to_record(status)}
    for model in record["models"]:
        for version in model["versions"]:
            version["traffic"] = traffic[model["name"], version["version"]]._asdict()
    return json.dumps(record)


def render_gone(options: StatusCommand, error: ServingError) -> str:
    """Return what stands for the status of a server that does not answer."""
    if options.json:
        return json.dumps({"server": options.server, "error": str(error)})
    return f"no server answers at {options.server} ({error}); waiting for one"


def show(options: StatusCommand, text: str) -> None:
    """Print a screen, in place of the one before on a terminal."""
    if options.json:
        print(text, flush=True)
    elif sys.stdout.isatty():
        print(f"{CLEAR}{text}", flush=True)
    else:
        print(f"{text}\n", flush=True)
