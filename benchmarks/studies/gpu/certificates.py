"""The certificate of each file, computed anew on the device, against what Keras has answered elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.studies.gpu.files import PRECISIONS, Results, describe, list_files, open_engine, parse_args, title
from export import parity
from export.manifest import Manifest
from resnet import BadInput


def main() -> None:
    """Certify all files that have their evidence beside them."""
    args = parse_args(__doc__)
    results = Results(args)
    for path in list_files(args.folders, *PRECISIONS.values()):
        if (path.parent / "probabilities.npy").is_file():
            results.attempt(f"certificate of {title(path)}", partial(_add, path, args.device, results))
    results.end()


def _add(path: Path, device: str, results: Results) -> None:
    verdict, rows = certify(path, describe(path), device)
    results.add("certificate", file=title(path), device=device, verdict=verdict, rows=rows)


def certify(path: Path, about: Manifest, device: str) -> tuple[str, list[dict[str, float]]]:
    """Return whether a file is within its budget on the device, in words, and the figures by batch size.

    Raises:
        BadInput: The manifest does not name the file, or the evidence is missing.
    """
    variant = next((one for one in about.certificate.variants if one.path == path.name), None)
    if variant is None:
        raise BadInput(f"the manifest beside {path} does not name it")
    evidence, answers = path.parent / "heldout.npz", path.parent / "probabilities.npy"
    if not (evidence.is_file() and answers.is_file()):
        raise BadInput(f"{evidence} or {answers} is missing")
    with np.load(evidence) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    expected, largest = np.load(answers), max(parity.BATCH_SIZES)
    batches = iter(np.split(expected, range(largest, len(expected), largest)))
    run = open_engine(path, about, device, largest).run
    variant = msgspec.structs.replace(variant, speedup={})  # that of the exporting machine
    certificate = parity.certify(lambda _: next(batches), [(variant, run)], images, labels)
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
