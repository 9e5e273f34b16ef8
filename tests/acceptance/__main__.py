"""Run the acceptance checks one after the other, and print one line of figures for each.

A model is trained on the handwritten digits and exported in fp32 first, in a temporary folder, unless --repository and
--run name what the checks need. Every check is a module of this package and runs in a process of its own, whose output
is printed if it fails. The exit code is 1 if a check fails.

Examples:
  python -m tests.acceptance
  python -m tests.acceptance conformance limits --repository demo/models
  python -m tests.acceptance reloads kills --reloads 5 --kills 5
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from export import repository
from resnet import BadInput, CheckFailed, cli

NAME = "digits"
TRAINING = ("--data", "digits", "--model", "resnet20", "--epochs", "2")  # a minute at most: no check needs accuracy
TRANSPORTS = ("native", "grpcio")


class AcceptanceCheck(NamedTuple):
    """A check: a module of this package.

    Attributes:
        module: Name of the module, and of the check.
        arguments: Its arguments, with `{repository}`, `{model}`, `{run}`, `{reloads}` and `{kills}` filled in.
        transports: Transports of the server that the check runs on, one run each; empty is one run without a choice.
    """

    module: str
    arguments: tuple[str, ...]
    transports: tuple[str, ...] = ()


CHECKS = (
    AcceptanceCheck("conformance", ("{repository}",), TRANSPORTS),
    AcceptanceCheck("limits", ("{repository}",), TRANSPORTS),
    AcceptanceCheck("reloads", ("{model}", "--reloads={reloads}")),
    AcceptanceCheck("kills", ("{run}", "--kills={kills}")),
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
    parser.add_argument("--reloads", type=int, default=100, help="reloads of a model (default: 100)")
    parser.add_argument("--kills", type=int, default=50, help="exports to kill (default: 50)")
    args = parser.parse_args()
    chosen = args.checks or names
    if unknown := [name for name in chosen if name not in names]:
        raise BadInput(f"there is no check {unknown[0]!r}; choose from {', '.join(names)}")
    with tempfile.TemporaryDirectory() as folder:
        checks = [check for check in CHECKS if check.module in chosen]
        values = {"reloads": args.reloads, "kills": args.kills, **_prepare(args, checks, Path(folder))}
        failed = [title for title, command in _list_runs(checks, values) if not _run(title, command)]
    if failed:
        raise CheckFailed(f"failed: {', '.join(failed)}")


def _prepare(args: argparse.Namespace, checks: Sequence[AcceptanceCheck], folder: Path) -> dict[str, object]:
    """Train and export what the checks need and the arguments do not name; return where all of it is."""
    needed = "".join(argument for check in checks for argument in check.arguments)
    run, models = args.run, args.repository
    needs_models = models is None and ("{repository}" in needed or "{model}" in needed)
    if run is None and ("{run}" in needed or needs_models):
        run = folder / "runs" / NAME
        _make("training", "train", *TRAINING, "--out", str(run))
    if needs_models:
        models = folder / "models"
        _make("export", "export", str(run), "--to", str(models / NAME))
    if models is None:
        return {"run": run}
    names = list(repository.models(models))
    if not names:
        raise BadInput(f"--repository {models} has no model; `resnet export` makes one")
    return {"run": run, "repository": models, "model": names[0]}


def _list_runs(checks: Sequence[AcceptanceCheck], values: dict[str, object]) -> Iterator[tuple[str, list[str]]]:
    """Yield the title and the command of each run of a check."""
    for check in checks:
        command = [sys.executable, "-m", f"tests.acceptance.{check.module}"]
        command += [argument.format(**values) for argument in check.arguments]
        for transport in check.transports:
            yield f"{check.module} {transport}", [*command, f"--transport={transport}"]
        if not check.transports:
            yield check.module, command


def _make(title: str, *arguments: str) -> None:
    """Run a command of `resnet`, whose output is printed if it fails."""
    if not _run(title, [sys.executable, "-m", "resnet", *arguments]):
        raise CheckFailed(f"there is no model to check, since `resnet {arguments[0]}` failed")


def _run(title: str, command: Sequence[str]) -> bool:
    """Run a command, print one line of figures, and return whether it succeeded."""
    started = time.monotonic()
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    passed = process.returncode == 0
    if not passed:
        print(f"{process.stdout}{process.stderr}".rstrip())
    figures = _read_figures(process.stdout) if passed else "see its output above"
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
