"""Recompute the proof of an exported model: are its files unchanged, and do they still compute what Keras does?"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnet import BadInput, CheckFailed


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet verify`."""
    parser.add_argument("model", type=Path, metavar="REPOSITORY/NAME", help="the model to verify")
    parser.add_argument("--version", type=int, help="which version (default: the latest)")


def run(args: argparse.Namespace) -> None:
    """Verify one version, and say what holds."""
    from export import repository

    folder = repository.latest(args.model) if args.version is None else args.model / str(args.version)
    if not folder.is_dir():
        raise BadInput(f"{args.model} has no version {args.version}; it has {repository.versions(args.model)}")
    verify(folder)


def verify(folder: Path) -> None:
    """Check hashes, recorded figures and recomputed figures of the version in `folder`.

    Raises:
        BadInput: The manifest cannot be read.
        CheckFailed: A file has changed, or a figure is outside its budget or is not what the certificate says.
    """
    from export import convert, manifest, parity
    from export.export import load_variants
    from export.source import load_heldout

    recorded = manifest.read(folder)
    changes = list(manifest.changed_files(folder, recorded))
    if changes:
        raise CheckFailed("; ".join(changes))
    print(f"{len(recorded.files)} files of {folder} are as exported")
    parity.check(recorded.certificate)

    images, labels = load_heldout(folder)
    reference = convert.load_keras(folder / "model.keras")
    recomputed = parity.certify(reference, load_variants(folder), images, labels, recorded.certificate.budget)
    print(parity.describe(recomputed))
    parity.check(recomputed)
    for name in ("images", "images_sha256"):
        if getattr(recorded.certificate, name) != getattr(recomputed, name):
            raise CheckFailed(f"the certificate speaks of other held-out images: {name} differs")
    # Another machine rounds in another way, which may turn a tie; an edited figure shows far above that.
    if abs(recorded.certificate.accuracy - recomputed.accuracy) > max(1e-3, 1 / len(labels)):
        raise CheckFailed(
            f"the certificate gives Keras an accuracy of {recorded.certificate.accuracy:.2%}, "
            f"but it is {recomputed.accuracy:.2%}"
        )
    print(f"{recorded.model}/{recorded.version} is verified")
