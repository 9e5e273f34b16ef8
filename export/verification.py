"""Recompute the certificate of a model version, and compare it with the recorded one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from export import formats, manifest, original, parity
from export.manifest import Certificate, Manifest
from export.source import load_heldout
from resnet import CheckFailed


def verify(folder: Path) -> Manifest:
    """Check the hashes, the recorded certificate and a recomputed one, and print them.

    Args:
        folder: REPOSITORY/NAME/VERSION.

    Returns:
        The manifest of the version.

    Raises:
        BadInput: The manifest cannot be read.
        CheckFailed: A file has changed, or a figure is outside its budget or differs from the certificate.
    """
    recorded = manifest.read(folder)
    changes = list(manifest.changed_files(folder, recorded))
    if changes:
        raise CheckFailed("; ".join(changes))
    print(f"the {len(recorded.files)} files of {folder} are unchanged")
    parity.check(recorded.certificate)

    images, labels = load_heldout(folder)
    reference = original.load(folder / "model.keras")
    variants = [(variant, formats.load(folder, variant)) for variant in recorded.certificate.variants]
    recomputed = parity.certify(reference, variants, images, labels)
    print(parity.describe(recomputed))
    parity.check(recomputed)
    for name in ("images", "images_sha256"):
        if getattr(recorded.certificate, name) != getattr(recomputed, name):
            raise CheckFailed(f"the certificate is about other held-out images: {name} differs")
    # Another machine rounds differently, which can change the class of a tie. Edited figures differ by far more.
    tolerance = max(1e-3, 1 / len(labels))
    for subject, before, now in _pair_accuracies(recorded.certificate, recomputed):
        if not abs(before - now) <= tolerance:  # NaN is outside too
            raise CheckFailed(f"the certificate gives {subject} an accuracy of {before:.2%}, but it is {now:.2%}")
    return recorded


def _pair_accuracies(recorded: Certificate, recomputed: Certificate) -> Iterator[tuple[str, float, float]]:
    """Yield the recorded and the recomputed value of each accuracy; NaN stands for one that was not recorded."""
    yield "Keras", recorded.accuracy, recomputed.accuracy
    for before, now in zip(recorded.variants, recomputed.variants, strict=True):
        accuracies = {row.batch_size: row.accuracy for row in before.rows}
        for row in now.rows:
            yield f"{now.name} at batch size {row.batch_size}", accuracies.get(row.batch_size, math.nan), row.accuracy
