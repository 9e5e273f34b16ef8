"""The certificate of each file, recomputed on the device against the answers that Keras gave on another machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import msgspec

from benchmarks.studies.gpu.files import PRECISIONS, Results, describe, list_files, open_engine, parse_args, title
from export import parity, reference
from export.manifest import Manifest
from resnet import BadInput


def main() -> None:
    """Certify all files that have the answers of Keras beside them, in reference.npz."""
    args = parse_args(__doc__)
    results = Results(args)
    for path in list_files(args.folders, *PRECISIONS.values()):
        if (path.parent / reference.NAME).is_file():
            results.attempt(f"certificate of {title(path)}", partial(_add, path, args.device, results))
    results.end()


def _add(path: Path, device: str, results: Results) -> None:
    verdict, rows = certify(path, describe(path), device)
    results.add("certificate", file=title(path), device=device, verdict=verdict, rows=rows)


def certify(path: Path, manifest: Manifest, device: str) -> tuple[str, list[dict[str, float]]]:
    """Compare the answers of a file on the device with those of Keras.

    Returns:
        The verdict in words, and the figures by batch size.

    Raises:
        BadInput: The manifest does not name the file, or the answers of Keras cannot be read.
    """
    variant = next((one for one in manifest.certificate.variants if one.path == path.name), None)
    if variant is None:
        raise BadInput(f"the manifest beside {path} does not name it; export it again")
    stored = reference.load(path.parent, manifest)
    run = open_engine(path, manifest, device, max(parity.BATCH_SIZES)).run
    variant = msgspec.structs.replace(variant, speedup={})  # it was measured on the exporting machine
    certificate = parity.certify(stored.probabilities, [(variant, run)], stored.images, stored.labels).certificate
    violations = list(certificate.variants[0].violations(certificate.images, certificate.accuracy))
    rows = [
        {
            "batch": row.batch_size,
            "max_difference": row.max_difference,
            "same_class": row.top1_agreement,
            "accuracy": row.accuracy,
            "accuracy_of_keras": certificate.accuracy,
        }
        for row in certificate.variants[0].rows
    ]
    return "; ".join(violations) or "within its budget", rows


if __name__ == "__main__":
    main()
