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

sys.excepthook = lambda kind, error, _: print(f"FAILED: {kind.__name__}: {error}")  # such as a file that is missing
folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
files, certificate, image = manifest["files"], manifest["certificate"], manifest["input"]["name"]
found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
unlisted = sorted(found.keys() - files.keys() - {"manifest.json", "manifest.sig", "model.sig"})
failures = [f"{name} was added" for name in unlisted if found[name].is_symlink() or not found[name].is_dir()]
for name in files:
    if name not in found or found[name].is_symlink():
        failures.append(f"{name} is missing, or a link")
    elif hashlib.sha256(found[name].read_bytes()).hexdigest() != files[name]:
        failures.append(f"{name} was changed")
if failures:  # nothing of it is run
    sys.exit("\n".join(f"FAILED: {failure}" for failure in failures))
stored = np.load(folder / "reference.npz", allow_pickle=False)
images, labels, keras = stored["images"], stored["labels"], stored["probabilities"]
right, n = keras.argmax(1) == labels, len(images)
print(f"{len(files)} files are unchanged; Keras is right on {right.mean():.2%} of {n:,} held-out images")
content = repr(images.shape).encode() + images.tobytes() + labels.astype("<i4").tobytes()
if hashlib.sha256(content).hexdigest() != certificate["images_sha256"]:
    failures.append("the certificate is about other images")
if not abs(right.mean() - certificate["accuracy"]) <= 1e-9:
    failures.append(f"the certificate is about a model that is right on {certificate['accuracy']:.2%}")
for path in sorted({folder / "model.onnx", *folder.glob("*.onnx")}):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (variant,) = (variant for variant in certificate["variants"] if variant["path"] == path.name)
    rows, budget = variant["rows"], variant["budget"]
    limit, drop = (1 if value is None else value for value in (budget["max_difference"], budget["accuracy_drop"]))
    failures += [] if rows and min(limit, drop) < 1 else [f"{path.name} has no comparison, or no budget"]
    limit = min(limit, 1e-5) if path.name == "model.onnx" else limit  # in full precision, no budget is wider
    for size, accuracy in [(row["batch_size"], row["accuracy"]) for row in rows]:
        batches = [images[np.arange(start, start + size) % n] for start in range(0, n, size)]
        answers = np.concatenate([session.run(None, {image: batch})[0] for batch in batches])[:n]
        correct, difference = answers.argmax(1) == labels, float(np.abs(answers - keras).max())
        lost, gained = int((right & ~correct).sum()), int((~right & correct).sum())
        a = (2 * n - lost + gained) * drop - lost - gained  # Would a loss of `drop` be refuted, at 95 % confidence?
        share = ((a * a + 8 * n * gained * drop * (1 - drop)) ** 0.5 - a) / (4 * n)  # Tango, Stat. Med. 17 (1998)
        least = 1.6448536 * (n * (2 * share + drop * (1 - drop))) ** 0.5 if budget["evidence"] == "bound" else -1e-6
        is_within = difference <= limit and n * drop - lost + gained >= least
        is_certified = abs(correct.mean() - accuracy) <= max(1e-3, 1 / n) + 1e-9
        verdict = "holds" if is_within and is_certified else "NOT AS CERTIFIED" if is_within else "OUTSIDE ITS BUDGET"
        print(f"{path.name}, batch size {size}: difference {difference:.1e}, {lost} lost, {gained} gained: {verdict}")
        failures += [] if verdict == "holds" else [f"{path.name}, batch size {size}"]
if failures:
    sys.exit("\n".join(f"FAILED: {failure}" for failure in failures))
print(f"{manifest['model']}/{manifest['version']} holds")
