"""Measure what computes a model fastest on this machine, and prove it, as `resnet serve` does when it loads one.

The results are cached for this user's servers. Use --again if the machine was busy.

Examples:
  resnet tune models/digits
  resnet tune models/digits --precision int8 --again
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from export.speed import name_cpu
from resnet.options import add_options, check, option, read
from serving.config import Batching, Compute, Precision
from serving.runtimes import RUNTIMES, Device

if TYPE_CHECKING:
    from serving.models.selection import Choice
    from serving.runtimes.tuning_result import Tuning


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """The options of `resnet tune`."""

    model: Path = option(MISSING, "model to measure", metavar="REPOSITORY/NAME")
    version: int | None = option(None, "version to measure (default: the latest)", low=1)
    precision: Precision = option("auto", "exported variant to measure; auto measures all")
    accuracy_budget: float | None = option(
        None,
        "most points of accuracy to lose (default: what a variant was exported with)",
        high=100,
        metavar="POINTS",
    )
    device: Device = option("auto", "device to measure; auto measures the CPU, and a GPU if it works")
    runtime: str = option("auto", "runtime to measure; auto measures all", choices=("auto", *RUNTIMES))
    max_batch: int = option(Batching.max_batch, "images in the largest batch", low=1, high=65_536)
    prove: str = option(Compute.prove, "held-out images to prove with, as for `resnet serve`", metavar="N|all|off")
    again: bool = option(False, "measure again, even if a result is cached")

    def __post_init__(self) -> None:
        check(self)
        self.to_compute().check(lambda name: f"--{name.replace('_', '-')}")

    def to_compute(self) -> Compute:
        """Return where and how to compute."""
        return Compute(
            precision=self.precision,
            accuracy_budget=self.accuracy_budget,
            device=self.device,
            runtime=self.runtime,
            prove=self.prove,
        )


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet tune`."""
    add_options(parser, TuneOptions)


def run(args: argparse.Namespace) -> None:
    """Measure one version, or look up its result, and print tables."""
    options = read(args, TuneOptions)

    from export import repository
    from serving import logs
    from serving.models import loader, selection
    from serving.models.placement import CheckedVersion, list_allowed_plans
    from serving.runtimes import autotune
    from serving.runtimes.cores import count_cores

    logs.start("human", "info")  # measuring takes some seconds, and says so
    loader.check_options(options.device, options.runtime)
    folder = repository.version(options.model, options.version)
    version = CheckedVersion(folder, loader.read_checked(folder))
    if options.precision != "auto":
        loader.find_variant(folder, version.manifest, options.precision)
    choices = selection.compare(version, options.to_compute(), options.max_batch, options.again)
    print(f"{version} on {name_cpu()}, {count_cores()} cores")
    print(describe_choices(choices, options.max_batch))
    if options.device in ("auto", "cpu") and options.precision != "auto":
        variant = loader.find_variant(folder, version.manifest, options.precision)
        plans = list_allowed_plans(options.to_compute())
        tuning, _ = autotune.tune(folder, version.manifest, variant, options.max_batch, plans)
        print(describe(tuning))
        for name, why in tuning.refusals.items():
            print(f"  {name} is not used: {why}")
        print(f"kept in {tuning.key.path}")


def describe_choices(choices: Sequence[Choice], max_batch: int) -> str:
    """Return a table of the variants and what computes them."""
    largest = f"{max_batch} images"
    rows: list[Sequence[str]] = [("variant", "computed by", "1 image", largest, "loses at most", "verdict")]
    for choice in choices:
        times = [f"{ns / 1e6:.2f} ms" if ns else "" for ns in choice.ns]
        lost = f"{choice.lost:.2f} points"
        rows.append((choice.variant.name, choice.backend, *times, lost, choice.verdict))
    return "\n".join(f"  {a:<10}  {b:<12}{c:>10}  {d:>11}  {e:>13}  {f}".rstrip() for a, b, c, d, e, f in rows)


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
