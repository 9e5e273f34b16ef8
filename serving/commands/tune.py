"""Measure how this machine's CPU computes a model fastest, as `resnet serve` does by itself, and show it.

What was measured is kept for the servers of this user; do it again where the machine was busy.

Examples:
  resnet tune models/digits
  resnet tune models/digits --precision int8 --again
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.runtimes.autotune import Tuning


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet tune`."""
    from serving.config import Config

    parser.add_argument("model", type=Path, metavar="REPOSITORY/NAME", help="the model to measure")
    parser.add_argument("--version", type=int, help="which version (default: the latest)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "int8"), help="default: fp32")
    parser.add_argument("--runtime", default="auto", choices=("auto", "onnxruntime", "openvino"), help="default: auto")
    parser.add_argument(
        "--max-batch", type=int, default=Config.max_batch, metavar="N", help=f"default: {Config.max_batch}"
    )
    parser.add_argument("--again", action="store_true", help="measure, even if it was done before")


def run(args: argparse.Namespace) -> None:
    """Measure one version, or look it up, and print a table."""
    from export import repository
    from resnet import BadInput
    from serving import logs
    from serving.models import registry
    from serving.runtimes import autotune, plan
    from serving.runtimes.cores import count_cores

    if args.max_batch < 1:
        raise BadInput(f"--max-batch must be at least 1, not {args.max_batch}")
    logs.start("human", "info")  # measuring takes a while, and says so
    folder = repository.version(args.model, args.version)
    manifest = registry.read_checked(folder)
    variant = registry.find_variant(folder, manifest, args.precision)
    choice = plan.list_plans(args.runtime)
    found, cached = autotune.tune(folder, manifest, variant, args.max_batch, choice, args.again)
    print(f"{manifest.model}/{manifest.version} in {args.precision} on {found.setting.cpu}, {count_cores()} cores")
    print(describe(found))
    for name, why in found.refusals.items():
        print(f"  {name} is not used: {why}")
    print(f"{'measured before' if cached else 'measured now'}: {found.setting.path}")


def describe(tuning: Tuning) -> str:
    """Return a table of what batches took in each way, with a star at the chosen one, and the plan."""
    width = max(24, *(len(str(way)) + 3 for way in tuning.ways))
    lines = [f"  {'images':>6}" + "".join(f"{way!s:>{width}}" for way in tuning.ways)]
    for images, row in tuning.ns.items():
        cells = [
            f"{'*' if way == tuning.plan[images] else ''} {ns / 1e6:.2f} ms {images / ns * 1e9:>7,.0f}/s"
            for way, ns in zip(tuning.ways, row, strict=True)
        ]
        lines.append(f"  {images:>6}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join([*lines, f"  plan: {tuning}"])
