"""The table of formats: what an export writes and what `resnet verify` loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from export import certificate, formats, manifest
from export.formats import FORMATS
from resnet import BadInput


def test_every_format_is_in_the_certificate_and_answers(
    repository: Path, heldout: tuple[NDArray[np.uint8], NDArray[np.int32]], probabilities: NDArray[np.float32]
) -> None:
    """In the order of the table, with its path; and what is required is in the table."""
    version = repository / "digits" / "1"
    variants = manifest.read(version).certificate.variants
    assert [(variant.name, variant.path) for variant in variants] == [(row.name, row.path) for row in FORMATS]
    assert {*certificate.REQUIRED} <= {row.name for row in FORMATS}
    for variant in variants:
        answers = formats.load(version, variant)(heldout[0][:9])
        np.testing.assert_allclose(answers, probabilities[:9], atol=1e-5)


def test_an_unknown_format_is_refused(repository: Path) -> None:
    """A version of a later release may have one."""
    version = repository / "digits" / "1"
    variant = manifest.read(version).certificate.variants[0]
    unknown = msgspec.structs.replace(variant, name="tflite")
    with pytest.raises(BadInput, match="unknown format 'tflite' .known: onnx, saved_model.; export the model again"):
        formats.load(version, unknown)


def test_the_table_loads_no_library() -> None:
    """The command line reads it for its help."""
    code = "import sys, export.formats; print({'tensorflow', 'keras', 'onnx', 'onnxruntime'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"
