"""manifest.json: the files of a model version, and the certificate that they compute the same as the original.

The export writes it and the server reads it; its format is defined here only. Loading this module needs no TensorFlow.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from export import files
from export.certificate import Certificate
from resnet import BadInput
from training.images import Resize

FORMAT = 3
COLORS = {1: "grey", 3: "RGB", 4: "RGBA"}  # by the number of channels
NAME, SIGNATURE, OLD_SIGNATURE = "manifest.json", "model.sig", "manifest.sig"
UNHASHED = {NAME, SIGNATURE, OLD_SIGNATURE}  # the files of a version that the manifest does not list
CHANGED = "is not the file that was exported (its SHA-256 differs)"


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Name, NumPy dtype and shape of an input or output; the batch axis is -1."""

    name: str
    dtype: str
    shape: list[int]


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
        color: What the channels are, one of `COLORS`.
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
        input: The images: uint8 [-1, height, width, channels].
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


class _Name(msgspec.Struct):
    model: str


class _Header(msgspec.Struct):
    format: int


def read(folder: Path) -> Manifest:
    """Read the manifest of the version in `folder`.

    Raises:
        BadInput: It is missing or invalid, has another format, or belongs to another version.
    """
    return parse(folder, read_content(folder))


def read_name(folder: Path) -> str:
    """Return the name of the model whose version is in `folder`, whatever the folders above are called.

    Raises:
        BadInput: The manifest is missing, or has no name.
    """
    try:
        return msgspec.json.decode(read_content(folder), type=_Name).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{folder / NAME} is not a valid manifest ({error}); export the model again") from None


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
    """Yield a clause for every file that is missing, was added, is a link, or has another SHA-256 than in the manifest.

    Hidden files are no exception; empty folders do no harm.
    """
    try:
        found = files.list_entries(folder)
    except OSError as error:
        yield f"{error.filename} cannot be read ({error.strerror})"
        return
    links = {name for name, status in found.items() if stat.S_ISLNK(status.st_mode)} - manifest.files.keys()
    for name in sorted(links):
        yield f"{str(folder / name)!r} is a link, which a version may not hold"
    for name in sorted(manifest.files.keys() - found.keys()):
        yield f"{folder / name} is missing"
    for name in sorted(found.keys() - manifest.files.keys() - UNHASHED - links):
        if not stat.S_ISDIR(found[name].st_mode):
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
