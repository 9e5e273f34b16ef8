"""manifest.json: the files of a model version, and the certificate that they compute the same as the original.

The export writes it and the server reads it; its format is defined here only. Loading this module needs no TensorFlow.
"""

from __future__ import annotations

import hashlib
import math
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from export import files
from resnet import BadInput
from training.images import Resize

FORMAT = 2
NAME, SIGNATURE, OLD_SIGNATURE = "manifest.json", "model.sig", "manifest.sig"
UNHASHED = {NAME, SIGNATURE, OLD_SIGNATURE}  # the files of a version that the manifest does not list
CHANGED = "is not the file that was exported (its SHA-256 differs)"
ROUNDING = 1e-9  # error of a difference of two accuracies; one image of a million is a thousand times as much
REQUIRED = ("onnx", "saved_model")  # variants without which a certificate does not hold


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Name, NumPy dtype and shape of an input or output; the batch axis is -1."""

    name: str
    dtype: str
    shape: list[int]


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The permitted difference of a variant from the original; a limit of None is not checked.

    Attributes:
        max_difference: Largest absolute difference of any probability. If it is set, the predicted classes must be the
            same too.
        accuracy_drop: Largest loss of accuracy, as a share: 0.005 is half a point.
        tie: If the two best probabilities of the original are closer than this, either class is right.
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
    """The comparison of one variant at one batch size with the Keras original, on the same images.

    Attributes:
        batch_size: Images per call.
        max_difference: Largest absolute difference of any probability.
        mean_difference: Mean absolute difference of all probabilities.
        top1_agreement: Share of images with the same predicted class, 0 to 1.
        top1_disagreements: Number of images with another predicted class, without ties of the original.
        accuracy: Share of correctly classified images, 0 to 1.
        class_agreement: `top1_agreement` of the images of each class; None for a class without images.
        worst: Indices of the images with the largest differences, at most ten, largest first.
    """

    batch_size: int
    max_difference: float
    mean_difference: float
    top1_agreement: float
    top1_disagreements: int
    accuracy: float
    class_agreement: list[float | None]
    worst: list[int]


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One converted model and its comparison with the original.

    Attributes:
        name: Name of its format, as `onnx` or `saved_model`; `onnx-fp16` and `onnx-int8` in lower precision.
        path: Its file inside the version folder; `.` for a SavedModel, which is the folder itself.
        precision: Precision of its computation: `fp32`, `fp16` or `int8`.
        method: How its precision was lowered, in words; empty for fp32.
        budget: The permitted difference.
        rows: The comparison at each batch size.
        speedup: Its speed on the CPU of the exporting machine, as a multiple of that of `onnx`, by batch size.
        arithmetic: The arithmetic of the comparison, in words, if it is another than that of the library that runs the
            file.
    """

    name: str
    path: str
    precision: str
    method: str
    budget: Budget
    rows: list[Parity]
    speedup: dict[int, float]
    arithmetic: str = ""

    def violations(self, images: int, accuracy: float) -> Iterator[str]:
        """Yield a clause for every figure outside the budget, with its worst value.

        Args:
            images: Number of images of the comparison.
            accuracy: Accuracy of the original, 0 to 1.
        """
        if not self.rows:
            yield f"there are no comparisons for {self.name}"
        if self.budget.max_difference is None and self.budget.accuracy_drop is None:
            yield f"{self.name} has no budget"
        if not self.rows:
            return
        limit, drop = self.budget.max_difference, self.budget.accuracy_drop
        row = self._worst(lambda row: row.max_difference)
        if limit is not None and not row.max_difference <= limit:  # NaN is outside too
            yield f"the largest difference {self._name(row)} is {row.max_difference:.3g}, above {limit:.3g}"
        elif math.isnan(row.max_difference):
            yield f"some answers {self._name(row)} are not numbers"
        row = self._worst(lambda row: row.top1_disagreements)
        if limit is not None and row.top1_disagreements:
            predictions = f"{row.top1_disagreements} of {images} predictions {self._name(row)}"
            yield f"{predictions} name another class than Keras"
        row = self._worst(lambda row: -row.accuracy)
        # In floating point, 59.2 % less 59.1 % is slightly more than 0.1 %.
        if drop is not None and not accuracy - row.accuracy <= drop + ROUNDING:
            yield (
                f"the accuracy {self._name(row)} is {row.accuracy:.2%}, {100 * (accuracy - row.accuracy):.2f} points "
                f"below Keras' {accuracy:.2%}; {100 * drop:g} are allowed"
            )

    def _worst(self, figure: Callable[[Parity], float]) -> Parity:
        """Return the row with the largest value of a figure; NaN is larger than any number."""
        return max(self.rows, key=lambda row: math.inf if math.isnan(figure(row)) else figure(row))

    def _name(self, row: Parity) -> str:
        return f"of {self.name} at batch size {row.batch_size}"


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The comparison of every variant with the original, on images that the model was not trained on.

    Attributes:
        images: Number of images.
        images_sha256: Hash of their pixels and labels.
        accuracy: Share of images that the Keras original classifies correctly, 0 to 1.
        variants: The converted models, those of `REQUIRED` among them.
    """

    images: int
    images_sha256: str
    accuracy: float
    variants: list[Variant]

    def find(self, name: str) -> Variant | None:
        """Return the variant with this name, or None."""
        return next((variant for variant in self.variants if variant.name == name), None)

    def violations(self) -> Iterator[str]:
        """Yield a clause for every figure outside its budget, and for missing comparisons."""
        for name in REQUIRED:
            if not self.find(name):
                yield f"there are no comparisons for {name}"
        if self.images < 1:
            yield "it was made without images"
        for variant in self.variants:
            yield from variant.violations(self.images, self.accuracy)


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and arithmetic of the graph in `model.onnx`.

    Attributes:
        nodes: Number of operators.
        nodes_converted: Number of operators before simplification.
        parameters: Number of values in its constants.
        bytes: Size of the file.
        multiply_adds: Multiply-adds of convolutions and matrix products for one image; each is two floating-point
            operations.
    """

    nodes: int
    nodes_converted: int
    parameters: int
    bytes: int
    multiply_adds: int


class Preprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an image file becomes a row of the input; scaling of values is part of the graph.

    Attributes:
        color: Order of the channels.
        resize: Rule by which images of another size are resized; `training.images.RESIZES` says what each computes.
    """

    color: str = "RGB"
    resize: Resize = "bilinear"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of manifest.json.

    Attributes:
        format: Version of this format.
        model: Name of the model.
        version: Number of the model version.
        created: Time of the export, in ISO 8601, UTC.
        input: The images: uint8 [-1, height, width, 3].
        output: The probabilities: float32 [-1, classes].
        labels: Names of the classes, in the order of the output.
        preprocessing: How an image file becomes pixels.
        opset: Operator set of the ONNX file.
        cost: Size and arithmetic of the ONNX graph.
        versions: Versions of the libraries used in the export, by name.
        cpu: Name of the CPU on which the certificate was made.
        training: Content of metrics.json of the training; None for a model that `resnet train` did not make.
        files: SHA-256 of every other file of the version, by path inside its folder.
        certificate: The comparison with the original.
        digest: SHA-256 of all of the above, as compact JSON with sorted keys; it reveals edits.
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
    training: dict[str, Any] | None
    files: dict[str, str]
    certificate: Certificate
    digest: str = ""

    def write(self, folder: Path) -> None:
        """Write manifest.json into the folder of a version, with its digest."""
        complete = msgspec.structs.replace(self, digest=self.compute_digest())
        (folder / NAME).write_bytes(msgspec.json.format(msgspec.json.encode(complete), indent=2) + b"\n")

    def check_output(self, shape: Sequence[int]) -> None:
        """Raise `BadInput` if a model whose output has this shape computes another number of classes than it should."""
        if tuple(shape[1:]) != (len(self.labels),):
            raise BadInput(
                f"{self.model}/{self.version} has {len(self.labels)} labels for an output of shape {list(shape)}; "
                "export the model again"
            )

    def compute_digest(self) -> str:
        """Return the digest of the other attributes."""
        plain = msgspec.to_builtins(msgspec.structs.replace(self, digest=""), str_keys=True)
        content = msgspec.json.encode(plain, order="deterministic")
        return hashlib.sha256(content).hexdigest()


class _Header(msgspec.Struct):
    format: int


def read(folder: Path) -> Manifest:
    """Read the manifest of the version in `folder`.

    Raises:
        BadInput: It is missing or invalid, has another format, or belongs to another version.
    """
    return parse(folder, read_content(folder))


def read_content(folder: Path) -> bytes:
    """Return the content of the manifest of the version in `folder`.

    Raises:
        BadInput: It is missing, or is not a file that can be read.
    """
    path = folder / NAME
    try:
        return files.read(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); export the model again") from None


def parse(folder: Path, content: bytes) -> Manifest:
    """Return the manifest with this content, of the version in `folder`; errors as in `read`."""
    path = folder / NAME
    try:
        number = msgspec.json.decode(content, type=_Header).format
        if number != FORMAT:
            raise BadInput(f"{path} has format {number}, this version of resnet reads {FORMAT}; export again")
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{path} is not a valid manifest ({error}); export the model again") from None
    if manifest.digest != manifest.compute_digest():
        raise BadInput(f"{path} was edited: its digest differs from that of its content; export the model again")
    if str(manifest.version) != folder.name or manifest.model != folder.parent.name:
        raise BadInput(
            f"{path} belongs to {manifest.model}/{manifest.version}, not to {folder.parent.name}/{folder.name}; "
            "a version keeps its name: export the model under another one"
        )
    if manifest.output.shape[-1:] != [len(manifest.labels)]:
        raise BadInput(
            f"{path} names {len(manifest.labels)} labels for {manifest.output.shape[-1]} outputs; export again"
        )
    return manifest


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below `folder` except its manifest, by path inside the folder."""
    entries = sorted(files.list_entries(folder).items())
    names = [name for name, status in entries if not stat.S_ISDIR(status.st_mode) and name not in UNHASHED]
    return {name: files.compute_hash(folder / name) for name in names}


def changed_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield a clause for every file that is missing, was added, or whose SHA-256 is not that of the manifest.

    Hidden files, such as those that file managers and editors leave, are ignored: nothing loads them.
    """
    try:
        found = files.list_entries(folder)
    except OSError as error:
        yield f"{error.filename} cannot be read ({error.strerror})"
        return
    for name in sorted(manifest.files.keys() - found.keys()):
        yield f"{folder / name} is missing"
    for name in sorted(found.keys() - manifest.files.keys() - UNHASHED):
        if not stat.S_ISDIR(found[name].st_mode) and not any(part.startswith(".") for part in name.split("/")):
            yield f"{str(folder / name)!r} was added after the export, remove it"
    for name in sorted(manifest.files.keys() & found.keys()):
        try:
            if files.compute_hash(folder / name) != manifest.files[name]:
                yield f"{folder / name} {CHANGED}"
        except OSError as error:
            yield f"{folder / name} cannot be read ({error.strerror})"


def read_file(folder: Path, name: str, manifest: Manifest) -> bytes:
    """Return the content of a file of a version. It is read once: what is loaded is what was hashed.

    Raises:
        BadInput: It cannot be read, or its SHA-256 is not that of the manifest.
    """
    try:
        content = files.read(folder / name)
    except OSError as error:
        raise BadInput(f"{folder / name} cannot be read ({error.strerror}); export the model again") from None
    if hashlib.sha256(content).hexdigest() != manifest.files.get(name):
        raise BadInput(f"{folder / name} {CHANGED}; export the model again")
    return content
