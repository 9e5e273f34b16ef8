"""Exporting from Python: `resnet.export`, whose keywords are the options of the command."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from export.certificate import EvidenceRule
from export.formats import NEWEST_OPSET, OLDEST_OPSET, OPSET
from resnet import BadInput
from resnet.options import check, option, sort_keywords
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


def export(source: str | Path, to: str | Path, **options: Any) -> Path | str:
    """Convert a model, prove that the converted ones compute what it does, and publish them, as `resnet export` does.

    Args:
        source: A run folder, or a .keras or .h5 file of a model.
        to: REPOSITORY/NAME of the model to publish the version of, in a folder or at a URL.
        **options: The other options of the command, with underscores: `precision="fp32,int8"`, `evidence="point"`.

    Returns:
        The place of the new version.

    Raises:
        BadInput: An option, the source or the target cannot be used.
        CheckFailed: A converted model is not the original; see `export.export.export`.
    """
    (values,) = sort_keywords({"source": source, "to": to} | options, ExportOptions)
    chosen, sign = ExportOptions(**values), None
    if chosen.sign is not None:
        from export import signature

        sign = partial(signature.sign, key=signature.load_private(chosen.sign))

    start_tensorflow(required=True)  # both formats are made by it
    from export import remote
    from export import source as sources
    from export.certificate import Budget
    from export.export import BUDGETS
    from export.export import export as run

    loaded = sources.load(
        chosen.source,
        chosen.data,
        labels=chosen.labels,
        preprocess=chosen.preprocess,
        logits=chosen.logits,
        image_size=chosen.image_size,
        resize=chosen.resize,
    )
    drops = {"fp16": chosen.fp16_drop, "int8": chosen.int8_drop}
    budgets = BUDGETS | {
        name: Budget(accuracy_drop=points / 100, evidence=chosen.evidence) for name, points in drops.items()
    }
    precisions = [name for name in dict.fromkeys(chosen.precision) if name != "fp32"]
    with remote.check_out(chosen.to) as model:
        return run(loaded, model.folder, precisions, budgets, chosen.opset, sign, model.publish)
