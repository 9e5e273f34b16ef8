"""Classify many images without a server: files, folders, tar archives, Parquet tables and arrays, local or by URL.

The model is checked, tuned and proved as `resnet serve` does. Each image becomes a row of the output, in the order of
the data, also if it cannot be read: then the row says why. The output appears once it is whole. A run that was
interrupted continues with --resume.

Examples:
  resnet predict photos --model models/digits --to labels.csv
  resnet predict 'shards/*.tar' --model models/digits/1 --to labels.parquet --top-k 5
  resnet predict s3://bucket/photos --model models/digits --to s3://bucket/labels.parquet --device cuda
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import MISSING, dataclass

from resnet import BadInput
from resnet.options import add_options, check, option, read
from resnet.storage import is_url
from serving.config import Compute


@dataclass(frozen=True, kw_only=True)
class PredictionOptions:
    """What `resnet predict` reads and writes."""

    model: str = option(
        MISSING, "model or version to use, or URL of a model", metavar="REPOSITORY/NAME[/VERSION]", required=True
    )
    to: str = option(MISSING, "file or URL to write: .csv, .jsonl or .parquet", metavar="FILE", required=True)
    top_k: int = option(1, "classes to write per image", low=1, metavar="K")
    all: bool = option(False, "write the probabilities of all classes, in the order of the model's labels")
    column: str | None = option(None, "column of Parquet files with the images (default: it is found)", metavar="NAME")
    on: str | None = option(None, "predict on a Ray cluster: ray, or ray=ADDRESS", metavar="ray[=ADDRESS]")
    resume: bool = option(False, "continue a run that was interrupted")
    max_batch: int | None = option(
        None, "images in the largest batch (default: 32 on a CPU, 256 on a GPU)", low=1, high=65_536
    )


@dataclass(frozen=True, kw_only=True)
class PredictCommand(Compute, PredictionOptions):
    """The options of `resnet predict`, except for the data."""

    def __post_init__(self) -> None:
        check(self)
        Compute.check(self, lambda name: f"--{name.replace('_', '-')}")
        if self.all and self.top_k > 1:
            raise BadInput("--all writes the probabilities of all classes; leave out --top-k")
        if self.on is not None and self.on.partition("=")[0] != "ray":
            raise BadInput(f"--on must be ray or ray=ADDRESS, not {self.on!r}")

    @property
    def cluster(self) -> str | None:
        """The address of the Ray cluster; None without --on."""
        return None if self.on is None else self.on.partition("=")[2]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet predict`."""
    parser.add_argument("data", nargs="+", metavar="DATA", help="files, folders, globs, or URLs of these")
    add_options(parser, PredictCommand)


def run(args: argparse.Namespace) -> None:
    """Predict, and print one line."""
    options = read(args, PredictCommand)

    from export import remote, repository
    from serving import logs
    from serving.predict.job import PredictionJob

    logs.start("human", "warning")
    logging.getLogger("serving").setLevel(logging.INFO)  # measuring takes some seconds, and says so
    with remote.check_out(options.model) as checkout:
        model = checkout.folder
        if is_url(options.model):
            model = repository.latest(model)
            checkout.complete(model)
        job = PredictionJob(
            args.data, model, options.to, options.top_k, options.all, options.column, options.max_batch, options
        )
        try:
            done = job.run(options.resume, options.cluster)
        except KeyboardInterrupt:
            print("\nwhat was finished is kept; the same command with --resume continues", file=sys.stderr, end="")
            raise
    failed = f", of which {done.errors:,} could not be read" if done.errors else ""
    rate = f"{done.predicted / done.seconds:,.0f} images/s" if done.predicted else "nothing was left to predict"
    print(f"{options.to}: {done.images:,} images{failed}; {rate}")
