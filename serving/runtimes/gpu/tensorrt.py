"""TensorRT in onnxruntime: the options of its execution provider, and the cache of the engines that it builds."""

from __future__ import annotations

import importlib
import logging
import os
from contextlib import suppress
from pathlib import Path

from export.manifest import Manifest
from serving.runtimes import cache

PROVIDER = "TensorrtExecutionProvider"

log = logging.getLogger(__name__)


def make_options(path: Path, manifest: Manifest, max_batch: int, is_half: bool) -> dict[str, str]:
    """Return the options of the TensorRT provider for an ONNX file, after loading the libraries that it needs.

    Building an engine takes minutes, so engines are cached. They are code that no signature covers, so the cache is the
    user's and not the repository's.

    Args:
        path: The ONNX file.
        manifest: The manifest of the version.
        max_batch: Images in the largest batch.
        is_half: Whether the file was certified in half precision.
    """
    with suppress(ImportError):
        importlib.import_module("tensorrt")  # loads the libraries that pip installed, if there are any
    # Unlike the CUDA provider, the TensorRT provider has no option that turns TF32 off.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    _, *shape = manifest.input.shape

    def format_shape(images: int) -> str:
        return f"{manifest.input.name}:{'x'.join(map(str, (images, *shape)))}"

    options = {
        "trt_fp16_enable": "1" if is_half else "0",
        "trt_profile_min_shapes": format_shape(1),
        "trt_profile_opt_shapes": format_shape(max_batch),
        "trt_profile_max_shapes": format_shape(max_batch),
    }
    folder = cache.find_folder("tensorrt") / manifest.digest / path.stem
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("TensorRT builds %s anew at every start: %s cannot be written (%s)", path, folder, error.strerror)
    else:
        options |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(folder),
        }
    return options
