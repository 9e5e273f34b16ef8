"""manifest.json: what a model version contains, and the proof that its files compute what the original does.

The format is defined here, once; the export writes it and the server reads it. Loading this module needs no TensorFlow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from resnet import BadInput

FORMAT = 2
NAME = "manifest.json"
ROUNDING = 1e-9  # of a difference of two accuracies; an image among a million weighs a thousand times as much


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Name, NumPy dtype and shape of an input or output; -1 stands for the batch axis."""

    name: str
    dtype: str
    shape: list[int]


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a variant may differ by. A limit that is None is not set.

    Attributes:
        max_difference: Largest absolute difference of any probability; with it, no answer may name another class.
        accuracy_drop: How much lower the accuracy may be than the original's, as a share: 0.005 is half a point.
        tie: Where the original's two best probabilities are closer than this, either class may win.
    """

    max_difference: float | None = None
    accuracy_drop: float | None = None
    tie: float = 1e-5

    def __str__(self) -> str:
        limits = []
        if self.max_difference is not None:
            limits.append(f"a difference of {self.max_difference:.0e}")
        if self.accuracy_drop is not None:
            limits.append(f"{100 * self.accuracy_drop:g} points less accuracy")
        return " and ".join(limits)


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one variant answers at one batch size, against the Keras original on the same images.

    Attributes:
        batch_size: Images in one call.
        max_difference: Largest absolute difference of any probability.
        mean_difference: Mean absolute difference of all probabilities.
        top1_agreement: Share of images for which both name the same class, 0 to 1.
        top1_disagreements: Images with another class although the original's two best are no tie.
        accuracy: Share of images whose class is right, 0 to 1.
        class_agreement: `top1_agreement` among the images of each class; None for a class that none is of.
        worst: Indices of the images with the largest differences, at most ten, the worst first.
    """

    batch_size: int
    max_difference: float
    mean_difference: float
    top1_agreement: float
    top1_disagreements: int
    accuracy: float
    class_agreement: list[float | None]
    worst: list[int]


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One converted model and how it answers.

    Attributes:
        name: `onnx` or `saved_model`, or `onnx-fp16` or `onnx-int8` for less precision.
        path: Its file inside the version; `.` for the SavedModel, which is the folder itself.
        precision: Of its computation: `fp32`, `fp16` or `int8`.
        method: How its precision was reached, in words; empty for fp32.
        budget: What it may differ by.
        rows: Its figures at each batch size.
        speedup: How many times faster than `onnx` it was on the exporting machine's CPU, by batch size.
    """

    name: str
    path: str
    precision: str
    method: str
    budget: Budget
    rows: list[Parity]
    speedup: dict[int, float]

    def violations(self, images: int, accuracy: float) -> Iterator[str]:
        """Yield a clause for every figure that is outside the budget, given those of the original."""
        if not self.rows:
            yield f"there is no evidence for {self.name}"
        if self.budget.max_difference is None and self.budget.accuracy_drop is None:
            yield f"{self.name} has no budget"
        for row in self.rows:
            where = f"of {self.name} at batch size {row.batch_size}"
            limit = self.budget.max_difference
            if limit is not None:
                if not row.max_difference <= limit:  # so that NaN counts as outside
                    yield f"the largest difference {where} is {row.max_difference:.3g}, above {limit:.3g}"
                if row.top1_disagreements:
                    yield f"{row.top1_disagreements} of {images} answers {where} name another class than Keras"
            drop = self.budget.accuracy_drop
            # Shares of so many images: 59.2 % less 59.1 % is a rounding error more than 0.1 %.
            if drop is not None and not accuracy - row.accuracy <= drop + ROUNDING:
                yield (
                    f"the accuracy {where} is {row.accuracy:.2%}, {100 * (accuracy - row.accuracy):.2f} points below "
                    f"Keras' {accuracy:.2%}; {100 * drop:g} are allowed"
                )


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The evidence: every variant at every batch size, on images that the model was not trained on.

    Attributes:
        images: Number of images.
        images_sha256: Hash of their pixels and classes.
        accuracy: Share of images that the Keras original classifies right, 0 to 1.
        variants: The converted models; `onnx` and `saved_model` among them.
    """

    images: int
    images_sha256: str
    accuracy: float
    variants: list[Variant]

    def find(self, name: str) -> Variant | None:
        """Return the variant of this name."""
        return next((variant for variant in self.variants if variant.name == name), None)

    def violations(self) -> Iterator[str]:
        """Yield a clause for every figure that is outside its budget, and for evidence that is missing."""
        for name in ("onnx", "saved_model"):
            if not self.find(name):
                yield f"there is no evidence for {name}"
        if self.images < 1:
            yield "there are no images behind it"
        for variant in self.variants:
            yield from variant.violations(self.images, self.accuracy)


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the graph of `model.onnx` costs.

    Attributes:
        nodes: Its operators.
        nodes_converted: How many it had before it was cleaned.
        parameters: Values of its constants.
        bytes: Size of the file.
        multiply_adds: Multiplications, each with an addition, of convolutions and matrix products for one image; twice
            as many floating-point operations.
    """

    nodes: int
    nodes_converted: int
    parameters: int
    bytes: int
    multiply_adds: int


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
        cost: What its graph costs.
        versions: Libraries that took part, by name.
        cpu: Processor on which the certificate was made.
        training: Where the weights come from, as the run's metrics.json says; None for a model from elsewhere.
        files: SHA-256 of every other file of the version, by path inside it.
        certificate: The proof.
        digest: SHA-256 of all of the above, as compact JSON with sorted keys: an edited figure shows.
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
    cost: Cost
    versions: dict[str, str]
    cpu: str
    training: dict[str, object] | None
    files: dict[str, str]
    certificate: Certificate
    digest: str = ""

    def write(self, folder: Path) -> None:
        """Write manifest.json into the folder of a version, with its digest."""
        complete = msgspec.structs.replace(self, digest=self.compute_digest())
        (folder / NAME).write_bytes(msgspec.json.format(msgspec.json.encode(complete), indent=2) + b"\n")

    def compute_digest(self) -> str:
        """Return what `digest` should be."""
        plain = msgspec.to_builtins(msgspec.structs.replace(self, digest=""), str_keys=True)
        content = msgspec.json.encode(plain, order="deterministic")
        return hashlib.sha256(content).hexdigest()


class _Header(msgspec.Struct):
    format: int


def read(folder: Path) -> Manifest:
    """Read the manifest of the version in `folder`.

    Raises:
        BadInput: It is missing, is not valid, or describes another version or format.
    """
    path = folder / NAME
    try:
        text = path.read_bytes()
        found = msgspec.json.decode(text, type=_Header).format
        if found != FORMAT:
            raise BadInput(f"{path} has format {found}, this version of resnet reads {FORMAT}; export again")
        manifest = msgspec.json.decode(text, type=Manifest)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); export the model again") from None
    except msgspec.DecodeError as error:
        raise BadInput(f"{path} is not a valid manifest ({error}); export the model again") from None
    if manifest.digest != manifest.compute_digest():
        raise BadInput(f"{path} was edited: its digest differs from what it says; export the model again")
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
