"""The table of the export formats: what `resnet export` writes beside the Keras original, and `resnet verify` loads.

A format is a row of `FORMATS` and a module with what `FormatModule` says. Loading this package needs neither TensorFlow
nor onnx.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from export.certificate import Variant
from export.manifest import Cost
from export.parity import Predict, RunError
from resnet import BadInput

if TYPE_CHECKING:
    import keras

OLDEST_OPSET = 13  # the first with weights quantized per channel
OPSET = 17  # with the newest, tf2onnx leaves a Transpose before global pooling
NEWEST_OPSET = 18  # of those that tf2onnx 1.17 converts to


class FormatModule(Protocol):
    """What the module of a format has."""

    def write(self, model: keras.Model, metadata: Mapping[str, str], path: Path, opset: int) -> Cost | None:
        """Convert a model.

        Args:
            model: The classifier, from uint8 [batch, height, width, channels] to float32 [batch, classes].
            metadata: What the file says of itself, if the format has a place for that.
            path: The file or folder to write; the folder exists already if it is that of the version.
            opset: Operator set, for formats that consist of ONNX operators.

        Returns:
            The cost of the converted graph; None for a format without such figures.
        """
        ...

    def load(self, path: Path) -> Predict:
        """Return a converted model as a function of a batch."""
        ...


class Format(NamedTuple):
    """An export format.

    Attributes:
        name: Its name in the certificate.
        path: Its file or folder inside the version folder; `.` is that folder itself.
        module: Its module, imported when it is used.
    """

    name: str
    path: str
    module: str

    def write(self, model: keras.Model, metadata: Mapping[str, str], folder: Path, opset: int) -> Cost | None:
        """Convert a model into a version folder; see `FormatModule.write`.

        Raises:
            BadInput: The libraries of the format cannot convert the model.
        """
        try:
            return self._import().write(model, metadata, folder / self.path, opset)
        except (BadInput, OSError, MemoryError):
            raise
        except Exception as error:  # each library has its own exceptions
            cause = str(error).strip().partition("\n")[0]
            raise BadInput(f"the model cannot be converted to {self.name} ({type(error).__name__}: {cause})") from error

    def load(self, path: Path) -> Predict:
        """Return a converted model as a function of a batch."""
        return self._import().load(path)

    def _import(self) -> FormatModule:
        return cast(FormatModule, importlib.import_module(self.module))


ONNX = Format("onnx", "model.onnx", "export.formats.onnx")

FORMATS = (
    ONNX,  # the server runs it, and the variants in lower precision are made from it
    Format("saved_model", ".", "export.formats.saved_model"),
)
"""All formats, in the order in which an export writes them."""


def load(folder: Path, variant: Variant) -> Predict:
    """Return a converted model of the version in `folder` as a function of a batch, in the arithmetic of its precision.

    Raises:
        BadInput: Its format is unknown.
        RunError: Its library cannot load it.
    """
    load = _find_loader(folder, variant)
    try:
        return load(folder / variant.path)
    except Exception as error:  # each library has its own exceptions
        raise RunError(f"{variant.name} cannot be loaded: {error}") from error


def _find_loader(folder: Path, variant: Variant) -> Callable[[Path], Predict]:
    if variant.precision == "fp16":
        from export import half

        return half.load
    # A variant in lower precision is called FORMAT-PRECISION.
    name = variant.name.removesuffix(f"-{variant.precision}")
    for row in FORMATS:
        if row.name == name:
            return row.load
    known = ", ".join(row.name for row in FORMATS)
    raise BadInput(f"{folder} has a variant of the unknown format {name!r} (known: {known}); export the model again")
