"""Look after a model repository: what it holds, what was proved, whether it still holds, and what may go.

Examples:
  resnet models list models
  resnet models show models/digits
  resnet models verify models
  resnet models label models/digits stable 2        (`resnet models label models/digits stable` takes it away)
  resnet models prune models --keep 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from export import manifest, parity, repository
from resnet import BadInput, CheckFailed


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `resnet models` and their options."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(VERBS))
    for verb, meaning in VERBS.items():
        action = verbs.add_parser(verb, help=meaning, description=meaning)
        if verb != "schema":
            action.add_argument(
                "folder", type=Path, metavar="REPOSITORY[/NAME]", help="a repository, or one of its models"
            )
        if verb == "prune":
            action.add_argument("--keep", type=int, default=3, help="how many of the latest versions stay (default: 3)")
        if verb == "label":
            action.add_argument("label", metavar="LABEL", help="a name, as stable or canary")
            action.add_argument("number", type=int, nargs="?", metavar="VERSION", help="which version gets it")
        if verb == "show":
            action.add_argument("--version", type=int, help="which version (default: the latest)")


VERBS = {
    "list": "print a line for every version",
    "show": "print what one version is, and its proof",
    "label": "give a label to a version, by which clients may ask for it, or take it away",
    "schema": "print the JSON Schema of manifest.json",
    "verify": "recompute the proof of every version",
    "prune": "remove all but the latest and the labelled versions, and what killed exports left",
}


def run(args: argparse.Namespace) -> None:
    """Do what the verb says."""
    actions = {"list": _list, "show": _show, "label": _label, "schema": _schema, "verify": _verify, "prune": _prune}
    actions[args.verb](args)


def _models(folder: Path) -> list[Path]:
    """Return the models of a repository, or the one model that the folder is."""
    return [folder] if repository.versions(folder) else repository.models(folder)


def _model(folder: Path) -> Path:
    """Return the one model that is meant."""
    models = _models(folder)
    if len(models) > 1:
        raise BadInput(f"{folder} holds {len(models)} models; name one of them, as {models[0]}")
    return models[0]


def _list(args: argparse.Namespace) -> None:
    print(f"{'model':<24} {'input':<14} {'classes':>7}  {'accuracy':>8}  {'precision':<16}  created")
    for model in _models(args.folder):
        for number in repository.versions(model):
            name = f"{model.name}/{number}"
            try:
                found = manifest.read(model / str(number))
            except BadInput as error:
                print(f"{name:<24} {error}")
                continue
            size = "x".join(str(side) for side in found.input.shape[1:])
            precisions = ", ".join(dict.fromkeys(variant.precision for variant in found.certificate.variants))
            labels = [label for label, version in repository.labels(model).items() if version == number]
            print(
                f"{name:<24} {size:<14} {len(found.labels):>7}  {found.certificate.accuracy:>8.2%}  {precisions:<16}  "
                f"{found.created}" + (f"  {', '.join(labels)}" if labels else "")
            )


def _show(args: argparse.Namespace) -> None:
    folder = repository.version(_model(args.folder), args.version)
    found = manifest.read(folder)
    print(f"{found.model}/{found.version}, exported {found.created}")
    print(f"  input   {found.input.name}: {found.input.dtype} {found.input.shape}")
    print(f"  output  {found.output.name}: {found.output.dtype} {found.output.shape}")
    print(f"  labels  {', '.join(found.labels)}")
    print(f"  files   {len(found.files)}, {sum((folder / name).stat().st_size for name in found.files) / 1e6:.1f} MB")
    cost = found.cost
    print(
        f"  graph   {cost.nodes} nodes, {cost.parameters:,} parameters, {cost.multiply_adds / 1e6:,.1f} M multiply-adds"
    )
    print(f"  made by {', '.join(f'{name} {number}' for name, number in found.versions.items())}")
    print(parity.describe(found.certificate))


def _label(args: argparse.Namespace) -> None:
    model = _model(args.folder)
    if args.number is None:
        repository.unlabel(model, args.label)
        print(f"{model.name} has no {args.label} any longer")
    else:
        repository.label(model, args.label, args.number)
        print(f"{model.name}/{args.number} is {args.label}")


def _schema(_: argparse.Namespace) -> None:
    schema = msgspec.json.encode(msgspec.json.schema(manifest.Manifest))
    print(msgspec.json.format(schema, indent=2).decode())


def _verify(args: argparse.Namespace) -> None:
    from export.commands.verify import verify

    failed = []
    for model in _models(args.folder):
        for number in repository.versions(model):
            try:
                verify(model / str(number))
            except (BadInput, CheckFailed) as error:
                failed.append(f"{model.name}/{number}")
                print(f"{model.name}/{number} does not hold: {error}")
    if failed:
        raise CheckFailed(f"{', '.join(failed)} cannot be verified; the reasons are above")


def _prune(args: argparse.Namespace) -> None:
    if args.keep < 1:
        raise BadInput(f"--keep must be at least 1, not {args.keep}")
    for model in _models(args.folder):
        for path in repository.prune(model, args.keep):
            print(f"removed {path}")
