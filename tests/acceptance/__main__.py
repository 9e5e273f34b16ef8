"""Run the acceptance checks one after the other, and print one line of figures for each.

A model is trained on the handwritten digits and exported in fp32 first, in a temporary folder, unless --repository and
--run name what the checks need. Every check is a module of this package and runs in a process of its own, whose output
is printed if it fails, and which is ended after half an hour. What this user or machine cannot do is
named as SKIPPED in the line of its check. The exit code is 1 if a check fails.

All checks take an hour or two; with --scale 0.05, each does a twentieth of its work.

Examples:
  python -m tests.acceptance
  python -m tests.acceptance conformance limits --repository demo/models
  python -m tests.acceptance --scale 0.05
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from benchmarks.harness.tree import ProcessTree
from export import repository
from resnet import BadInput, CheckFailed, cli

NAME = "digits"
TRAINING = ("--data", "digits", "--model", "resnet20", "--epochs", "2")  # a minute at most: no check needs accuracy
TRANSPORTS = ("native", "grpcio")


class AcceptanceCheck(NamedTuple):
    """A check: a module of this package.

    Attributes:
        module: Name of the module, and of the check.
        arguments: Its arguments, with `{repository}`, `{model}` and `{run}` filled in.
        lengths: For each option that says how much the check does, its usual value.
        transports: Transports of the server that the check runs on, one run each; empty is one run without a choice.
        minutes: Time after which a run is ended.
    """

    module: str
    arguments: tuple[str, ...]
    lengths: Mapping[str, int] = MappingProxyType({})
    transports: tuple[str, ...] = ()
    minutes: float = 30


MODELS = ("{repository}",)
CHECKS = (
    AcceptanceCheck("conformance", MODELS, transports=TRANSPORTS),
    AcceptanceCheck("limits", MODELS, transports=TRANSPORTS),
    AcceptanceCheck("mutations", MODELS, {"messages": 200_000, "images": 20_000}, TRANSPORTS),
    AcceptanceCheck("cancellations", MODELS, {"calls": 50_000}, TRANSPORTS),
    AcceptanceCheck("overload", MODELS, {"seconds": 60}, TRANSPORTS),
    AcceptanceCheck("signals", MODELS, {"rounds": 20}, TRANSPORTS),
    AcceptanceCheck("restarts", MODELS, {"requests": 5000, "restarts": 14}, TRANSPORTS),
    AcceptanceCheck("reloads", MODELS, {"reloads": 100}),
    AcceptanceCheck("rollouts", MODELS, {"hold": 2}, TRANSPORTS),
    AcceptanceCheck("alarms", (), {"rollouts": 1000}),
    AcceptanceCheck("churn", MODELS, {"seconds": 60}),
    AcceptanceCheck("scarcity", MODELS, {"steps": 5}, TRANSPORTS),
    AcceptanceCheck("storage", MODELS, {"versions": 20}),
    AcceptanceCheck("places", (*MODELS, "--run={run}")),
    AcceptanceCheck("image", MODELS),
    AcceptanceCheck("ray_serve", MODELS, {"seconds": 5}),
    AcceptanceCheck("kills", ("{run}",), {"kills": 50}),
    AcceptanceCheck("predict", MODELS, {"images": 200_000, "kills": 5}),
    AcceptanceCheck("soak", MODELS, {"seconds": 600}, TRANSPORTS),
)


def main() -> None:
    """Run the chosen checks.

    Raises:
        BadInput: There is no check of a name, or --repository has no model.
        CheckFailed: A check failed, or the model could not be made.
    """
    names = [check.module for check in CHECKS]
    parser = argparse.ArgumentParser(
        prog="python -m tests.acceptance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"checks to run: {', '.join(names)} (default: all)")
    parser.add_argument("--repository", type=Path, help="model repository to serve (default: a new one)")
    parser.add_argument("--run", type=Path, help="run folder to export (default: a new one)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the usual work of each check (default: 1)")
    args = parser.parse_args()
    chosen = args.checks or names
    if unknown := [name for name in chosen if name not in names]:
        raise BadInput(f"there is no check {unknown[0]!r}; choose from {', '.join(names)}")
    with tempfile.TemporaryDirectory() as folder:
        checks = [check for check in CHECKS if check.module in chosen]
        values = _prepare(args, checks, Path(folder))
        failed = [
            title
            for check in checks
            for title, command in _list_runs(check, values, args.scale)
            if not _run(title, command, check.minutes)
        ]
    if failed:
        raise CheckFailed(f"failed: {', '.join(failed)}")


def _prepare(args: argparse.Namespace, checks: Sequence[AcceptanceCheck], folder: Path) -> dict[str, object]:
    """Train and export what the checks need and the arguments do not name; return where all of it is."""
    needed = "".join(argument for check in checks for argument in check.arguments)
    run, models = args.run, args.repository
    needs_models = models is None and "{repository}" in needed
    if run is None and ("{run}" in needed or needs_models):
        run = folder / "runs" / NAME
        _make("training", "train", *TRAINING, "--out", str(run))
    if needs_models:
        models = folder / "models"
        _make("export", "export", str(run), "--to", str(models / NAME))
    if models is not None and not repository.models(models):
        raise BadInput(f"--repository {models} has no model; `resnet export` makes one")
    return {"run": run, "repository": models}


def _list_runs(check: AcceptanceCheck, values: Mapping[str, object], scale: float) -> Iterator[tuple[str, list[str]]]:
    """Yield the title and the command of each run of a check."""
    command = [sys.executable, "-m", f"tests.acceptance.{check.module}"]
    command += [argument.format(**values) for argument in check.arguments]
    command += [f"--{name}={max(1, round(scale * usual))}" for name, usual in check.lengths.items()]
    for transport in check.transports:
        yield f"{check.module} {transport}", [*command, f"--transport={transport}"]
    if not check.transports:
        yield check.module, command


def _make(title: str, *arguments: str) -> None:
    """Run a command of `resnet`, whose output is printed if it fails."""
    if not _run(title, [sys.executable, "-m", "resnet", *arguments]):
        raise CheckFailed(f"there is no model to check, since `resnet {arguments[0]}` failed")


def _run(title: str, command: Sequence[str], minutes: float = 30) -> bool:
    """Run a command, print one line of figures, and return whether it succeeded; it fails if it takes longer."""
    started = time.monotonic()
    # A session of its own, so that the servers of a check can be ended with it.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        timer = threading.Timer(60 * minutes, ProcessTree(process.pid).end, (0,))
        timer.start()
        output, _ = process.communicate()
        timer.cancel()
    seconds = time.monotonic() - started
    passed = process.returncode == 0
    if not passed:
        print(output.rstrip())
    figures = _read_figures(output) if passed else "see its output above"
    line = f"{title:<20} {'pass' if passed else 'FAIL'} {seconds:7.1f} s  {figures}"
    print(line.rstrip(), flush=True)
    return passed


def _read_figures(output: str) -> str:
    """Return the figures of a check: the JSON object on the last line of its output; empty without one."""
    try:
        figures = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        return ""
    return ", ".join(f"{name} {_format(value)}" for name, value in figures.items()) if isinstance(figures, dict) else ""


def _format(value: object) -> str:
    if isinstance(value, list):
        return "/".join(map(_format, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
