"""Measure which threads and runtime are fastest for a model on this CPU, as `resnet serve` does when it loads one.

The result is cached for this user's servers. Use --again if the machine was busy.

Examples:
  resnet tune models/digits
  resnet tune models/digits --precision int8 --again
"""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resnet.options import add_options, check, option, read
from serving.config import Batching, Precision
from serving.runtimes import RUNTIMES

if TYPE_CHECKING:
    from serving.runtimes.tuning_result import Tuning


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """The options of `resnet tune`."""

    model: Path = option(MISSING, "model to measure", metavar="REPOSITORY/NAME")
    version: int | None = option(None, "version to measure (default: the latest)", low=1)
    precision: Precision = option("fp32", "exported variant to measure")
    runtime: str = option("auto", "runtime to measure; auto measures all", choices=("auto", *RUNTIMES))
    max_batch: int = option(Batching.max_batch, "images in the largest batch", low=1, high=65_536)
    again: bool = option(False, "measure again, even if a result is cached")

    def __post_init__(self) -> None:
        check(self)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet tune`."""
    add_options(parser, TuneOptions)


def run(args: argparse.Namespace) -> None:
    """Measure one version, or look up its result, and print a table."""
    options = read(args, TuneOptions)

    from export import repository
    from serving import logs
    from serving.models import loader
    from serving.runtimes import autotune
    from serving.runtimes.cores import count_cores
    from serving.runtimes.plan import list_plans

    logs.start("human", "info")  # measuring takes some seconds, and says so
    folder = repository.version(options.model, options.version)
    manifest = loader.read_checked(folder)
    variant = loader.find_variant(folder, manifest, options.precision)
    candidates = list_plans(options.runtime)
    tuning, cached = autotune.tune(folder, manifest, variant, options.max_batch, candidates, options.again)
    print(f"{manifest.model}/{manifest.version} in {options.precision} on {tuning.key.cpu}, {count_cores()} cores")
    print(describe(tuning))
    for name, why in tuning.refusals.items():
        print(f"  {name} is not used: {why}")
    print(f"{'measured before' if cached else 'measured now'}: {tuning.key.path}")


def describe(tuning: Tuning) -> str:
    """Return a table of the batch times of each plan, with a star at the chosen one."""
    width = max(24, *(len(str(plan)) + 3 for plan in tuning.candidates))
    lines = [f"  {'images':>6}" + "".join(f"{plan!s:>{width}}" for plan in tuning.candidates)]
    for images, row in tuning.ns.items():
        cells = [
            f"{'*' if plan == tuning.plans[images] else ''} {ns / 1e6:.2f} ms {images / ns * 1e9:>7,.0f}/s"
            for plan, ns in zip(tuning.candidates, row, strict=True)
        ]
        lines.append(f"  {images:>6}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join([*lines, f"  plan: {tuning}"])
