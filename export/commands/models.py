"""Manage a model repository: list, show, label, verify and prune its versions.

Examples:
  resnet models list models
  resnet models show models/digits
  resnet models label models/digits stable 2        (`resnet models label models/digits stable` removes the label)
  resnet models verify models
  resnet models prune models --keep 2
  resnet models list s3://bucket/models
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from export import attestation, manifest, parity, remote, repository
from resnet import BadInput, CheckFailed
from resnet.options import COUNT
from training.backend import start_tensorflow

VERBS = {
    "list": "print one line per version",
    "show": "print the manifest and parity certificate of a version",
    "label": "set or remove a label, which clients can request like a version",
    "schema": "print the JSON Schema of manifest.json, or of the attested certificate",
    "verify": "verify every version, as `resnet verify` does",
    "prune": "remove old versions without a label, and leftovers of killed exports",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `resnet models` and their options."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(VERBS))
    for verb, meaning in VERBS.items():
        action = verbs.add_parser(verb, help=meaning, description=meaning)
        if verb == "label":
            action.add_argument("place", metavar="REPOSITORY[/NAME]", help="model, or a repository with a single model")
            action.add_argument("label", metavar="LABEL", help="label, such as stable or canary")
            action.add_argument(
                "number",
                type=COUNT,
                nargs="?",
                metavar="VERSION",
                help="version to label (default: remove the label)",
            )
        elif verb == "show":
            action.add_argument("place", metavar="REPOSITORY[/NAME]", help="model, or a repository with a single model")
            action.add_argument("--version", type=COUNT, metavar="N", help="version to show (default: the latest)")
        elif verb == "schema":
            action.add_argument(
                "--certificate",
                action="store_true",
                help="print that of the predicate of parity-certificate.intoto.json",
            )
        else:
            action.add_argument("place", metavar="REPOSITORY[/NAME]", help="repository, or one of its models")
        if verb == "verify":
            action.add_argument(
                "--full",
                action="store_true",
                help="compare every format with the Keras original, which runs the code of both",
            )
        if verb == "prune":
            action.add_argument(
                "--keep",
                type=COUNT,
                default=3,
                metavar="N",
                help="number of latest versions to keep (default: 3)",
            )


def run(args: argparse.Namespace) -> None:
    """Run one verb."""
    if args.verb == "schema":
        _print_schema(args.certificate)
        return
    actions = {"list": _list, "show": _show, "label": _label, "verify": _verify, "prune": _prune}
    with remote.check_out(args.place) as args.checkout:
        actions[args.verb](args)


def _list_models(folder: Path) -> list[Path]:
    """Return all models of a repository, or the folder itself if it is a model."""
    return [folder] if repository.versions(folder) else repository.models(folder)


def _find_model(folder: Path) -> Path:
    """Return the folder if it is a model, or the only model of a repository."""
    models = _list_models(folder)
    if len(models) > 1:
        raise BadInput(f"{folder} holds {len(models)} models; name one of them, such as {models[0]}")
    return models[0]


def _list(args: argparse.Namespace) -> None:
    print(f"{'model':<24} {'input':<14} {'classes':>7}  {'accuracy':>8}  {'precision':<16}  created")
    for model in _list_models(args.checkout.folder):
        try:
            numbers, model_labels = repository.versions(model), repository.labels(model)
        except OSError as error:
            print(f"{model.name:<24} {error}")
            continue
        for number in numbers:
            name = f"{model.name}/{number}"
            try:
                version = manifest.read(model / str(number))
            except BadInput as error:
                print(f"{name:<24} {args.checkout.explain(error)}")
                continue
            size = "x".join(str(side) for side in version.input.shape[1:])
            precisions = ", ".join(dict.fromkeys(variant.precision for variant in version.certificate.variants))
            labels = [label for label, labelled in model_labels.items() if labelled == number]
            print(
                f"{name:<24} {size:<14} {len(version.labels):>7}  {version.certificate.accuracy:>8.2%}  "
                f"{precisions:<16}  {version.created}" + (f"  {', '.join(labels)}" if labels else "")
            )


def _show(args: argparse.Namespace) -> None:
    folder = repository.version(_find_model(args.checkout.folder), args.version)
    version = manifest.read(folder)
    size = sum((folder / name).stat().st_size for name in version.files)
    cost = version.cost
    print(f"{version.model}/{version.version}, exported {version.created}")
    print(f"  input      {version.input.name}: {version.input.dtype} {version.input.shape}")
    print(f"  output     {version.output.name}: {version.output.dtype} {version.output.shape}")
    print(f"  labels     {', '.join(version.labels)}")
    print(f"  files      {len(version.files)}, {size / 1e6:.1f} MB")
    print(
        f"  graph      {cost.nodes} nodes, {cost.parameters:,} parameters, "
        f"{cost.multiply_adds / 1e6:,.1f} M multiply-adds per image"
    )
    print(f"  libraries  {', '.join(f'{name} {number}' for name, number in version.versions.items())}")
    print(parity.describe(version.certificate))


def _label(args: argparse.Namespace) -> None:
    model = _find_model(args.checkout.folder)
    if args.number is None:
        repository.unlabel(model, args.label)
        print(f"removed the label {args.label} from {model.name}")
    else:
        repository.label(model, args.label, args.number)
        print(f"{model.name}/{args.number} is {args.label}")


def _print_schema(certificate: bool) -> None:
    schema = attestation.schema() if certificate else msgspec.json.schema(manifest.Manifest)
    print(msgspec.json.format(msgspec.json.encode(schema), indent=2).decode())


def _verify(args: argparse.Namespace) -> None:
    if args.full:
        start_tensorflow(required=True)
    from export.verification import verify

    failed = []
    for model in _list_models(args.checkout.folder):
        try:
            numbers = repository.versions(model)
        except OSError as error:
            failed.append(model.name)
            print(f"{model.name} is not verified: {error}")
            continue
        for number in numbers:
            name = f"{model.name}/{number}"
            try:
                args.checkout.complete(model / str(number))
                verify(model / str(number), full=args.full)
                print(f"{name} is verified")
            except (BadInput, CheckFailed) as error:
                failed.append(name)
                print(f"{name} is not verified: {args.checkout.explain(error)}")
    if failed:
        raise CheckFailed(f"not verified: {', '.join(failed)}; the reasons are above")


def _prune(args: argparse.Namespace) -> None:
    if args.keep < 1:
        raise BadInput(f"--keep must be at least 1, not {args.keep}")
    for model in _list_models(args.checkout.folder):
        for path in repository.prune(model, args.keep):
            print(f"removed {model.name}/{path.name}")
