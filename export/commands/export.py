"""Convert a trained model to SavedModel and ONNX, check that they agree with Keras, and publish a version.

Examples:
  resnet export runs/digits --to models/digits
  resnet export runs/digits --to models/digits --precision fp32,fp16,int8
  resnet export mine.keras --data path/to/images --to models/mine
  resnet export runs/digits --to s3://bucket/models/digits
"""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path

from export.certificate import EvidenceRule
from export.formats import NEWEST_OPSET, OLDEST_OPSET, OPSET
from resnet import BadInput
from resnet.options import add_options, check, option, read
from resnet.storage import find_name, is_url
from training.backend import start_tensorflow
from training.images import RESIZES, Resize, parse_size
from training.preprocessing import PREPROCESSING


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of `resnet export`."""

    source: Path = option(MISSING, "run folder, or .keras or .h5 file of a model", metavar="RUN|FILE")
    to: str = option(
        MISSING,
        "model to publish the version of, in a folder or at a URL as s3://bucket/models/digits",
        metavar="REPOSITORY/NAME",
        required=True,
    )
    precision: tuple[str, ...] = option(
        ("fp32",), "precisions to export; fp32 is always included", choices=("fp32", "fp16", "int8"), metavar="P,..."
    )
    fp16_drop: float = option(0.2, "maximum accuracy loss of fp16, in percentage points", low=0, high=100)
    int8_drop: float = option(0.5, "maximum accuracy loss of int8, in percentage points", low=0, high=100)
    evidence: EvidenceRule = option(
        "bound",
        "what must be within the maximum loss: bound, its upper bound at 95 % confidence, or point, as measured",
    )
    preprocess: str | None = option(
        None,
        "preprocessing to add to a model with float input: "
        + ", ".join(f"{kind} ({meaning})" for kind, meaning in PREPROCESSING.items()),
        choices=tuple(PREPROCESSING),
        metavar="KIND",
    )
    resize: Resize = option(
        "bilinear",
        "rule by which images of another size were resized in training: "
        + ", ".join(f"{rule} ({meaning})" for rule, meaning in RESIZES.items()),
        metavar="RULE",
    )
    logits: bool = option(False, "append a softmax to a model that ends in logits")
    image_size: str | None = option(
        None, "pixels of the images, for a model that takes any size: N by N, or height by width", metavar="N|HxW"
    )
    labels: Path | None = option(None, "file with one class name per line, in the order of the outputs")
    opset: int = option(
        OPSET, f"opset version of the ONNX files, {OLDEST_OPSET} to {NEWEST_OPSET}", low=OLDEST_OPSET, high=NEWEST_OPSET
    )
    sign: Path | None = option(None, "sign the version with this ECDSA private key in PEM", metavar="KEY.pem")
    data: str | None = option(
        None, "data set to compare the models on (default: heldout.npz beside the model)", metavar="DATA"
    )

    def __post_init__(self) -> None:
        check(self)
        parse_size(self.image_size)
        if is_url(self.to) and not find_name(self.to):
            raise BadInput(f"--to {self.to} is a bucket; name a model in it, as s3://bucket/models/digits")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet export`."""
    add_options(parser, ExportOptions)


def run(args: argparse.Namespace) -> None:
    """Export, and print the folder of the version."""
    options = read(args, ExportOptions)
    sign = None
    if options.sign is not None:
        from export import signature

        sign = partial(signature.sign, key=signature.load_private(options.sign))

    start_tensorflow(required=True)  # both formats are made by it
    from export import remote, source
    from export.certificate import Budget
    from export.export import BUDGETS, export

    loaded = source.load(
        options.source,
        options.data,
        labels=options.labels,
        preprocess=options.preprocess,
        logits=options.logits,
        image_size=options.image_size,
        resize=options.resize,
    )
    drops = {"fp16": options.fp16_drop, "int8": options.int8_drop}
    budgets = BUDGETS | {
        name: Budget(accuracy_drop=points / 100, evidence=options.evidence) for name, points in drops.items()
    }
    precisions = [name for name in dict.fromkeys(options.precision) if name != "fp32"]
    with remote.check_out(options.to) as model:
        place = export(loaded, model.folder, precisions, budgets, options.opset, sign, model.publish)
    print(f"published {place}")
