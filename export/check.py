"""Check a model version without the software that made it: python check.py [FOLDER]. Needs numpy and onnxruntime.

It compares every file with manifest.json, and the answers of each ONNX file with those of the Keras original, on the
held-out images in reference.npz. Exit code 0: everything holds; 1: something does not.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
manifest = json.loads((folder / "manifest.json").read_text())
certificate, files = manifest["certificate"], manifest["files"]
found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
unlisted = found.keys() - files.keys() - {"manifest.json", "manifest.sig", "model.sig"}
failures = [f"{name} is not in the manifest" for name in sorted(unlisted)]
for name, digest in files.items():
    if name not in found or found[name].is_symlink() or hashlib.sha256(found[name].read_bytes()).hexdigest() != digest:
        failures.append(f"{name} is missing or changed")


def bound(lost: int, gained: int, n: int) -> float:
    """Return the upper bound of the loss of accuracy, at 95 % confidence (Tango, Statistics in Medicine 17, 1998)."""
    low, high = (lost - gained) / n, 1.0
    for _ in range(60):
        d = (low + high) / 2
        a = (2 * n - lost + gained) * d - lost - gained
        share = (max(0.0, a * a + 8 * n * gained * d * (1 - d)) ** 0.5 - a) / (4 * n)
        is_above = n * d - lost + gained >= 1.6448536269514722 * max(0.0, n * (2 * share + d * (1 - d))) ** 0.5
        low, high = (low, d) if is_above else (d, high)
    return high


if not failures:
    reference = np.load(folder / "reference.npz", allow_pickle=False)
    images, labels, expected = reference["images"], reference["labels"], reference["probabilities"]
    right, n = expected.argmax(1) == labels, len(images)
    print(f"{len(files)} files are unchanged; Keras is right on {right.mean():.2%} of {n:,} held-out images")
    if n != certificate["images"] or abs(right.mean() - certificate["accuracy"]) > 1e-9:
        failures.append("the certificate is about other images or another model")
    for variant in [variant for variant in certificate["variants"] if variant["path"].endswith(".onnx")]:
        session, budget = onnxruntime.InferenceSession(found[variant["path"]].read_bytes()), variant["budget"]
        for size, recorded in [(row["batch_size"], row["accuracy"]) for row in variant["rows"]]:
            batches = [{manifest["input"]["name"]: images[start : start + size]} for start in range(0, n, size)]
            actual = np.concatenate([session.run(None, batch)[0] for batch in batches])
            correct, difference = actual.argmax(1) == labels, float(np.abs(actual - expected).max())
            lost, gained = int((right & ~correct).sum()), int((~right & correct).sum())
            loss = (lost - gained) / n if budget["evidence"] == "point" else bound(lost, gained, n)
            holds = difference <= (budget["max_difference"] or 1) and loss <= (budget["accuracy_drop"] or 1) + 1e-9
            name = (
                f"{variant['name']} in batches of {size}: largest difference {difference:.1e}, {lost} images lost and "
            )
            name += f"{gained} gained, a loss of at most {100 * loss:.2f} points of accuracy"
            if not holds or abs(correct.mean() - recorded) > max(1e-3, 1 / n) + 1e-9:
                failures.append(f"{name}: outside its budget, or not as certified")
            print(name)
print("\n".join(failures) or f"{manifest['model']}/{manifest['version']} holds")
sys.exit(bool(failures))
