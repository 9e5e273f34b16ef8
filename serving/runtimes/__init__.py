"""Runtimes: what computes a batch, on the CPU or on GPUs, and how the fastest is found.

To add a runtime for the CPU, add a row to `RUNTIMES` and a module that implements `serving.runtimes.plan.Runtime`.
"""

from __future__ import annotations

from typing import Literal

RUNTIMES = {"onnxruntime": "serving.runtimes.onnx", "openvino": "serving.runtimes.openvino"}
"""The runtimes for the CPU: name and module. A module is imported when its runtime is used."""

DEFAULT = "onnxruntime"
"""The runtime with which the export certified the model."""

Device = Literal["auto", "cuda", "tensorrt", "cpu"]
"""Where models are computed; `auto` is a GPU where one works."""
