"""Start the backend of Keras: before anything else imports it, with the settings that train fastest."""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path

from resnet.cli import set_variables

CPU_INFO = Path("/proc/cpuinfo")


def start_tensorflow(fuse: bool = False, required: bool = False) -> None:
    """Load TensorFlow with oneDNN's kernels and without its start-up notes, unless Keras uses another backend.

    On CPUs without VNNI TensorFlow leaves oneDNN off. A step of ResNet-18 on 32-pixel images then takes 2.1 s in place
    of 0.35 s (batch 64, two Zen 3 cores): TensorFlow's own gradient of a convolution is slow for small feature maps.

    Args:
        fuse: Let XLA fuse all operations but convolutions and matrix products. Keras composes batch normalisation of
            ten operations, each of which reads and writes memory: fused, a step of ResNet-20 takes a third less time.
        required: Let Keras use TensorFlow, whatever KERAS_BACKEND says.
    """
    set_variables()
    if required:
        os.environ["KERAS_BACKEND"] = "tensorflow"
    if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
        return
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    # It warns of each further network that is traced in one process.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    if fuse:  # convolutions, at which XLA is slow, stay with oneDNN
        flags = "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit --tf_xla_ops_to_cluster=FUSIBLE"
        os.environ.setdefault("TF_XLA_FLAGS", flags)
    # TensorFlow writes two notes of four lines to stderr, whatever its log level: one as it is loaded, and one with the
    # first tensor.
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        tensorflow = importlib.import_module("tensorflow")
        if "TF_CONFIG" not in os.environ:  # several machines join before the first tensor
            tensorflow.zeros(1)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def choose_precision() -> str:
    """Return the dtype policy that trains fastest here: `mixed_bfloat16` on a CPU that computes in it, else `float32`.

    On Zen 4, which has AVX512-BF16, a step takes two thirds of the time; CPUs without it or AMX convert each number. It
    holds for TensorFlow's convolutions. A GPU keeps `float32`, whose products TensorFlow shortens where it pays.
    """
    import keras

    if keras.backend.backend() != "tensorflow" or keras.distribution.list_devices("gpu"):
        return "float32"
    try:
        words = CPU_INFO.read_text().split()
    except OSError:  # not Linux
        return "float32"
    return "mixed_bfloat16" if {"avx512_bf16", "amx_bf16"} & set(words) else "float32"
