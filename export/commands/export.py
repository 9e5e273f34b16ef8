"""Convert a trained model to SavedModel and ONNX, prove that both compute what Keras does, and publish a new version.

Examples:
  resnet export runs/digits --to models/digits
  resnet export runs/digits --to models/digits --precision fp32,fp16,int8
  resnet export mine.keras --data path/to/images --to models/mine
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from resnet import BadInput


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet export`."""
    parser.add_argument("source", type=Path, metavar="RUN|FILE.keras", help="a run folder, or a Keras model file")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="REPOSITORY/NAME", help="where to publish the version"
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        metavar="P,...",
        help="fp32, which is always there, and perhaps fp16 and int8: fp32,fp16,int8 (default: fp32)",
    )
    parser.add_argument("--fp16-drop", type=float, default=0.1, help="points of accuracy it may lose (default: 0.1)")
    parser.add_argument("--int8-drop", type=float, default=0.5, help="points of accuracy it may lose (default: 0.5)")
    parser.add_argument(
        "--preprocess",
        metavar="KIND",
        help="what a model of float input wants, to become part of it: identity (0 to 255), unit (0 to 1), tf "
        "(-1 to 1), torch or caffe (ImageNet's mean taken off, as in keras.applications)",
    )
    parser.add_argument("--logits", action="store_true", help="append the softmax that the model lacks")
    parser.add_argument("--labels", type=Path, help="file of class names, in the order of the outputs")
    parser.add_argument("--opset", type=int, help="operator set of the ONNX file, 13 to 18 (default: 17)")
    parser.add_argument("--sign", type=Path, metavar="KEY.pem", help="sign the manifest with this Ed25519 key")
    parser.add_argument("--data", help="data set to prove the export with (default: what lies beside the model)")


def run(args: argparse.Namespace) -> None:
    """Export, and say where the version is."""
    drops = {"fp16": args.fp16_drop, "int8": args.int8_drop}
    wanted = [name for name in dict.fromkeys(args.precision.split(",")) if name != "fp32"]
    for name in wanted:
        if name not in drops:
            raise BadInput(f"--precision {name!r} is unknown; choose from fp32, fp16 and int8, with commas")
        if not 0 <= drops[name] <= 100:
            raise BadInput(f"--{name}-drop must be from 0 to 100 points, not {drops[name]:g}")

    sign = None
    if args.sign is not None:
        from export import signature

        sign = partial(signature.sign, key=signature.load_private(args.sign))

    from export import source
    from export.convert import NEWEST_OPSET, OPSET
    from export.export import BUDGETS, export
    from export.manifest import Budget

    if args.preprocess is not None and args.preprocess not in source.PREPROCESSING:
        raise BadInput(f"--preprocess {args.preprocess!r} is unknown; choose one of {', '.join(source.PREPROCESSING)}")
    found = source.load(args.source, args.data, labels=args.labels, preprocess=args.preprocess, logits=args.logits)
    opset = OPSET if args.opset is None else args.opset
    if not 13 <= opset <= NEWEST_OPSET:
        raise BadInput(
            f"--opset must be from 13, the first with weights quantized per channel, to {NEWEST_OPSET}, not {opset}"
        )
    budgets = BUDGETS | {name: Budget(accuracy_drop=points / 100) for name, points in drops.items()}
    print(f"published {export(found, args.to, wanted, budgets, opset, sign)}")
