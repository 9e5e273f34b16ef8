"""manifest.json: what a model version contains, and the proof that its files compute what the original does.

The format is defined here, once; the export writes it and the server reads it. Loading this module needs no TensorFlow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from resnet import BadInput

FORMAT = 1
NAME = "manifest.json"


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Name, NumPy dtype and shape of an input or output; -1 stands for the batch axis."""

    name: str
    dtype: str
    shape: list[int]


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a variant may differ by.

    Attributes:
        max_difference: Largest absolute difference of any probability.
        tie: Where the original's two best probabilities are closer than this, either class may win.
    """

    max_difference: float = 1e-5
    tie: float = 1e-5


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one variant answers at one batch size, against the Keras original on the same images.

    Attributes:
        batch_size: Images in one call.
        max_difference: Largest absolute difference of any probability.
        mean_difference: Mean absolute difference of all probabilities.
        top1_agreement: Share of images for which both name the same class, 0 to 1.
        top1_disagreements: Images with another class although the original's two best are no tie.
        accuracy: Share of images whose class is right, 0 to 1.
    """

    batch_size: int
    max_difference: float
    mean_difference: float
    top1_agreement: float
    top1_disagreements: int
    accuracy: float


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The evidence: every variant at every batch size, on images that the model was not trained on.

    Attributes:
        images: Number of images.
        images_sha256: Hash of their pixels and classes.
        accuracy: Share of images that the Keras original classifies right, 0 to 1.
        budget: What a variant may differ by.
        variants: `onnx` and `saved_model`, with their figures at each batch size.
    """

    images: int
    images_sha256: str
    accuracy: float
    budget: Budget
    variants: dict[str, list[Parity]]

    def violations(self) -> Iterator[str]:
        """Yield a clause for every figure that is outside the budget, and for evidence that is missing."""
        for variant in ("onnx", "saved_model"):
            if not self.variants.get(variant):
                yield f"there is no evidence for {variant}"
        if self.images < 1:
            yield "there are no images behind it"
        for variant, rows in self.variants.items():
            for row in rows:
                where = f"of {variant} at batch size {row.batch_size}"
                if not row.max_difference <= self.budget.max_difference:  # so that NaN counts as outside
                    limit = self.budget.max_difference
                    yield f"the largest difference {where} is {row.max_difference:.3g}, above {limit:.3g}"
                if row.top1_disagreements:
                    yield f"{row.top1_disagreements} of {self.images} answers {where} name another class than Keras"


class Preprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happens to an image file before it is a row of the input; scaling of values is part of the graph."""

    color: str = "RGB"
    resize: str = "bilinear"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of manifest.json.

    Attributes:
        format: Version of this format.
        model: Name of the model.
        version: Number of the model version.
        created: Time of the export, ISO 8601, UTC.
        input: The images: uint8 [-1, height, width, 3].
        output: The probabilities: float32 [-1, classes].
        labels: Names of the classes, in the order of the output.
        preprocessing: How an image file becomes pixels.
        opset: Operator set of the ONNX file.
        versions: Libraries that took part, by name.
        training: Where the weights come from, as the run's metrics.json says; None for a model from elsewhere.
        files: SHA-256 of every other file of the version, by path inside it.
        certificate: The proof.
    """

    format: int
    model: str
    version: int
    created: str
    input: TensorSpec
    output: TensorSpec
    labels: list[str]
    preprocessing: Preprocessing
    opset: int
    versions: dict[str, str]
    training: dict[str, object] | None
    files: dict[str, str]
    certificate: Certificate

    def write(self, folder: Path) -> None:
        """Write manifest.json into the folder of a version."""
        (folder / NAME).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")


def read(folder: Path) -> Manifest:
    """Read the manifest of the version in `folder`.

    Raises:
        BadInput: It is missing, is not valid, or describes another version or format.
    """
    path = folder / NAME
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); export the model again") from None
    except msgspec.DecodeError as error:
        raise BadInput(f"{path} is not a valid manifest ({error}); export the model again") from None
    if manifest.format != FORMAT:
        raise BadInput(f"{path} has format {manifest.format}, this version of resnet reads {FORMAT}; export again")
    if str(manifest.version) != folder.name or manifest.model != folder.parent.name:
        raise BadInput(
            f"{path} belongs to {manifest.model}/{manifest.version}, not to {folder.parent.name}/{folder.name}"
        )
    if manifest.output.shape[-1] != len(manifest.labels):
        raise BadInput(
            f"{path} names {len(manifest.labels)} labels for {manifest.output.shape[-1]} outputs; export again"
        )
    return manifest


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below `folder` but its manifest, by path inside it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    return {path.relative_to(folder).as_posix(): _hash(path) for path in paths}


def changed_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield a clause for every file that is missing or differs from what the manifest says of it."""
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing"
        elif _hash(path) != expected:
            yield f"{path} is not the file that was exported (its SHA-256 differs)"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
