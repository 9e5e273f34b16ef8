"""What computes a batch: the runtimes of the CPU, GPUs, and the choice among them.

A runtime is a row of `RUNTIMES` and a module with what `serving.runtimes.plan.Runtime` says.
"""

from __future__ import annotations

RUNTIMES = {"onnxruntime": "serving.runtimes.onnx", "openvino": "serving.runtimes.openvino"}
"""The runtimes of the CPU, by name. A module is imported when its runtime is used."""

DEFAULT = "onnxruntime"
"""The runtime with which the export certified the model."""
