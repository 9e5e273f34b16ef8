"""Variants of an exported ONNX file in lower precision: half precision, and 8-bit integers."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime import quantization
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers import float16
from onnxruntime.transformers.onnx_model import OnnxModel

# Sums over many values, and exponentials: half precision overflows or flushes to zero there.
KEPT_IN_FP32 = ("GlobalAveragePool", "ReduceMean", "Softmax")
CALIBRATION_BATCH = 32


class Quantization(NamedTuple):
    """One way to choose the scales of an int8 model.

    Attributes:
        method: How the range of each activation is taken from what the calibration images show.
        reduced: Weights of 7 bits: on x86 without VNNI the products of 8-bit values can overflow.
        ends: The first convolution and the last matrix product stay in fp32, whose errors weigh most.
    """

    method: CalibrationMethod
    reduced: bool
    ends: bool

    def __str__(self) -> str:
        bits, kept = 7 if self.reduced else 8, ", first and last layer in fp32" if self.ends else ""
        return f"{self.method.name.lower()} calibration, {bits}-bit weights{kept}"


# From the fastest to the most careful.
SEARCH = (
    Quantization(CalibrationMethod.MinMax, reduced=False, ends=False),
    Quantization(CalibrationMethod.MinMax, reduced=True, ends=False),
    Quantization(CalibrationMethod.MinMax, reduced=True, ends=True),
    Quantization(CalibrationMethod.Percentile, reduced=True, ends=True),
    Quantization(CalibrationMethod.Entropy, reduced=True, ends=True),
)


class Reduction(NamedTuple):
    """One way to reach a precision: in words, and as a function that writes the first file's variant to the second."""

    method: str
    write: Callable[[Path, Path], None]


def attempts(precision: str, calibration: NDArray[np.uint8] | None) -> list[Reduction]:
    """Return the ways to reach a precision, from the fastest to the most careful.

    Args:
        precision: `fp16` or `int8`.
        calibration: Images that the model was trained on, uint8 [n, height, width, 3]; int8 needs them.
    """
    if precision == "fp16":
        return [Reduction(f"{', '.join(KEPT_IN_FP32)} in fp32", to_fp16)]
    assert calibration is not None
    return [Reduction(str(how), partial(to_int8, images=calibration, how=how)) for how in SEARCH]


def to_fp16(source: Path, target: Path) -> None:
    """Write `source` in half precision; its input and output keep their types."""
    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *KEPT_IN_FP32]
    graph = float16.convert_float_to_float16(onnx.load(source), keep_io_types=True, op_block_list=blocked)
    OnnxModel(graph).topological_sort()  # the converter appends its casts
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, target)


def to_int8(source: Path, target: Path, images: NDArray[np.uint8], how: Quantization) -> None:
    """Write `source` with 8-bit weights per channel and 8-bit activations, as pairs of Quantize and Dequantize.

    Args:
        source: An ONNX file in fp32.
        target: The file to write.
        images: Images that the model was trained on, uint8 [n, height, width, 3]: they show how large activations get.
        how: One of `SEARCH`, or one of your own.
    """
    graph = onnx.load(source)
    kept = [node.name for node in graph.graph.node if node.op_type in ("Softmax", "Mul", "Cast")]
    if how.ends:
        weighted = [node.name for node in graph.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
        kept += [weighted[0], weighted[-1]]
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        # It prints how it goes about it.
        with contextlib.redirect_stdout(io.StringIO()):
            quantization.quantize_static(
                prepared,
                target,
                _Reader(graph.graph.input[0].name, images),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=how.reduced,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=kept,
                calibrate_method=how.method,
            )


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self, name: str, images: NDArray[np.uint8]) -> None:
        self._batches: Iterator[dict[str, Any]] = (
            {name: images[start : start + CALIBRATION_BATCH]} for start in range(0, len(images), CALIBRATION_BATCH)
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


logging.getLogger("onnxruntime.quantization").setLevel(logging.ERROR)
