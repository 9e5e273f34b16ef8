"""Variants of an ONNX file in lower precision: 16-bit floating point and 8-bit integers."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime import quantization as quantizer
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers import float16
from onnxruntime.transformers.onnx_model import OnnxModel

from export import half, quantized
from export.formats import OPSET

# Sums of many values and exponentials overflow or underflow in half precision.
KEPT_IN_FP32 = ("GlobalAveragePool", "ReduceMean", "Softmax")
CALIBRATION_BATCH = 8  # of 224-pixel images, ResNet-50 has 0.7 GB of values


class Quantization(NamedTuple):
    """Settings of a quantization to int8.

    Attributes:
        calibration: How the range of each activation follows from its values for the calibration images.
        reduce_range: Use 7 bits for weights: on x86 without VNNI the products of 8-bit values can overflow.
        outer_fp32: Keep the first convolution and the last matrix product, whose errors matter most, in fp32.
    """

    calibration: CalibrationMethod
    reduce_range: bool
    outer_fp32: bool

    def __str__(self) -> str:
        bits, fp32 = 7 if self.reduce_range else 8, ", first and last layer in fp32" if self.outer_fp32 else ""
        return f"{self.calibration.name.lower()} calibration, {bits}-bit weights{fp32}"


# From the fastest model to the most accurate one. Calibration by entropy is not among them: where few values are large,
# as behind the swish of EfficientNetB0, onnxruntime compares 48,000 ranges of one tensor, and had not ended after ten
# minutes.
QUANTIZATIONS = (
    Quantization(CalibrationMethod.MinMax, reduce_range=False, outer_fp32=False),
    Quantization(CalibrationMethod.MinMax, reduce_range=True, outer_fp32=False),
    Quantization(CalibrationMethod.MinMax, reduce_range=True, outer_fp32=True),
    Quantization(CalibrationMethod.Percentile, reduce_range=True, outer_fp32=True),
)


class Reduction(NamedTuple):
    """One way to lower the precision.

    Attributes:
        method: A description for people.
        write: Reads the fp32 file, its first argument, and writes the variant to the second.
        arithmetic: See `export.certificate.Variant`.
    """

    method: str
    write: Callable[[Path, Path], None]
    arithmetic: str = ""


def list_reductions(
    precision: str, calibration: NDArray[np.uint8] | None, network: keras.Model | None = None, opset: int = OPSET
) -> list[Reduction]:
    """Return the reductions to a precision, from the fastest model to the most accurate one.

    Args:
        precision: `fp16` or `int8`.
        calibration: Training images, uint8 [n, height, width, channels]; int8 needs them.
        network: The classifier as `training.quantization` trained it, if it did: its int8 is tried first.
        opset: Operator set of what is made of `network`.
    """
    if precision == "fp16":
        return [Reduction(f"{', '.join(KEPT_IN_FP32)} in fp32", to_fp16, half.ARITHMETIC)]
    assert calibration is not None
    calibrated = [Reduction(str(row), partial(to_int8, images=calibration, quantization=row)) for row in QUANTIZATIONS]
    if network is None:
        return calibrated

    def learn(bits: int) -> Reduction:
        def write(_: Path, target: Path) -> None:
            quantized.write(network, target, opset, quantized.LARGEST[bits])

        return Reduction(f"learned ranges, {bits}-bit weights", write)

    return [learn(8), learn(7), *calibrated]


def to_fp16(source: Path, target: Path) -> None:
    """Write `source` in half precision; input and output keep their types."""
    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *KEPT_IN_FP32]
    graph = float16.convert_float_to_float16(onnx.load(source), keep_io_types=True, op_block_list=blocked)
    OnnxModel(graph).topological_sort()  # the converter appends its casts at the end
    _drop_last_rounding(graph.graph)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, target)


def _drop_last_rounding(graph: onnx.GraphProto) -> None:
    """Remove the casts to half precision and back after a softmax in fp32: they would round probabilities to 0."""
    makers = {node.output[0]: node for node in graph.node}
    widened = makers[graph.output[0].name]
    rounded = makers.get(widened.input[0])
    if rounded is not None and widened.op_type == rounded.op_type == "Cast":
        makers[rounded.input[0]].output[0] = widened.output[0]
        graph.node.remove(widened)
        graph.node.remove(rounded)


def to_int8(source: Path, target: Path, images: NDArray[np.uint8], quantization: Quantization) -> None:
    """Write `source` with 8-bit weights per channel and 8-bit activations, in the QDQ format of onnxruntime.

    Args:
        source: An ONNX file in fp32.
        target: The file to write.
        images: Training images, uint8 [n, height, width, channels], to calibrate the ranges of activations with.
        quantization: One of `QUANTIZATIONS`, or other settings.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        excluded = [node.name for node in graph.node if node.op_type in ("Softmax", "Mul")]
        if quantization.outer_fp32:
            weighted = [node.name for node in graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
            excluded += [weighted[0], weighted[-1]]
        # It prints its progress.
        with contextlib.redirect_stdout(io.StringIO()):
            quantizer.quantize_static(
                prepared,
                target,
                _CalibrationReader(graph.input[0].name, images),
                quant_format=quantizer.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=quantization.reduce_range,
                activation_type=quantizer.QuantType.QUInt8,
                weight_type=quantizer.QuantType.QInt8,
                nodes_to_exclude=excluded,
                calibrate_method=quantization.calibration,
                extra_options={"CalibStridedMinMax": 1},
            )


class _CalibrationReader(quantizer.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Batches of images, which the calibration reads one at a time.

    It keeps all values of all layers for the batches that it reads together, and needs them to be equally long.
    """

    def __init__(self, name: str, images: NDArray[np.uint8]) -> None:
        starts = range(0, len(images), CALIBRATION_BATCH)
        self._batches = [{name: images[start : start + CALIBRATION_BATCH]} for start in starts]
        self._selected: Iterator[dict[str, Any]] = iter(())

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._selected = iter(self._batches[start_index:end_index])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._selected, None)


logging.getLogger("onnxruntime.quantization").setLevel(logging.ERROR)
