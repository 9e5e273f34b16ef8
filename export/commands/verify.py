"""Recompute the proof of an exported model: are its files unchanged, and do they still compute what Keras does?"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from export.manifest import Certificate
from resnet import CheckFailed


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `resnet verify`."""
    parser.add_argument("model", type=Path, metavar="REPOSITORY/NAME", help="the model to verify")
    parser.add_argument("--version", type=int, help="which version (default: the latest)")
    parser.add_argument("--trust", type=Path, metavar="KEY.pem", help="also demand a signature by this public key")


def run(args: argparse.Namespace) -> None:
    """Verify one version, and say what holds."""
    from export import repository

    folder = repository.version(args.model, args.version)
    if args.trust is not None:
        from export import signature

        signature.check(folder, signature.load_public(args.trust))
        print(f"{folder} is signed by {args.trust}")
    verify(folder)


def verify(folder: Path) -> None:
    """Check hashes, recorded figures and recomputed figures of the version in `folder`.

    Raises:
        BadInput: The manifest cannot be read.
        CheckFailed: A file has changed, or a figure is outside its budget or is not what the certificate says.
    """
    from export import convert, manifest, parity
    from export.source import load_heldout

    recorded = manifest.read(folder)
    changes = list(manifest.changed_files(folder, recorded))
    if changes:
        raise CheckFailed("; ".join(changes))
    print(f"{len(recorded.files)} files of {folder} are as exported")
    parity.check(recorded.certificate)

    images, labels = load_heldout(folder)
    reference = convert.load_keras(folder / "model.keras")
    variants = [(variant, convert.load_variant(folder, variant)) for variant in recorded.certificate.variants]
    recomputed = parity.certify(reference, variants, images, labels)
    print(parity.describe(recomputed))
    parity.check(recomputed)
    for name in ("images", "images_sha256"):
        if getattr(recorded.certificate, name) != getattr(recomputed, name):
            raise CheckFailed(f"the certificate speaks of other held-out images: {name} differs")
    # Another machine rounds in another way, which may turn a tie; an edited figure shows far above that.
    slack = max(1e-3, 1 / len(labels))
    for whose, before, now in _accuracies(recorded.certificate, recomputed):
        if not abs(before - now) <= slack:
            raise CheckFailed(f"the certificate gives {whose} an accuracy of {before:.2%}, but it is {now:.2%}")
    print(f"{recorded.model}/{recorded.version} is verified")


def _accuracies(recorded: Certificate, recomputed: Certificate) -> Iterator[tuple[str, float, float]]:
    """Yield each accuracy as it was recorded and as it is now, NaN for one that was not recorded."""
    yield "Keras", recorded.accuracy, recomputed.accuracy
    for before, now in zip(recorded.variants, recomputed.variants, strict=True):
        known = {row.batch_size: row.accuracy for row in before.rows}
        for row in now.rows:
            yield f"{now.name} at batch size {row.batch_size}", known.get(row.batch_size, math.nan), row.accuracy
