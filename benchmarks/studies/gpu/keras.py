"""The Keras original in `jax.jit`; an original that is missing is built with random weights."""

from __future__ import annotations

import os
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks.studies.gpu.files import Results, describe, list_files, parse_args, title
from benchmarks.studies.gpu.loops import SECONDS, make_batch, measure
from resnet import BadInput

BATCHES, TINY_BATCHES = (1, 32, 128), (1, 2)
# The precision that is served comes first, since XLA compiles for seconds at each batch size.
POLICIES = {"fp16": "mixed_float16", "fp32": "float32"}


def main() -> None:
    """Measure the original of each file, if Keras and JAX are installed."""
    args = parse_args(__doc__)
    results = Results(args)
    os.environ |= {"KERAS_BACKEND": "jax", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # float32 without TF32, as in the ONNX files
    if args.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    if all(map(find_spec, ("jax", "keras"))):
        for precision in POLICIES:
            for path in list_files(args.folders, "fp32"):
                title_ = f"Keras original of {title(path)}, {precision}"
                results.attempt(title_, partial(_measure, path, precision, args.tiny, results))
    else:
        print("left out: Keras or JAX is not installed")
    results.end()


def _measure(path: Path, precision: str, tiny: bool, results: Results) -> None:
    """Measure a network at all batch sizes.

    Raises:
        BadInput: There is no original in this precision, and the folder is not named after a network of the family.
    """
    import jax
    import keras

    from training import model as family

    manifest = describe(path)
    original = path.with_name("model.keras")
    keras.config.set_dtype_policy(POLICIES[precision])
    if precision == "fp32" and original.is_file():
        model = keras.models.load_model(original, compile=False)
    else:
        architecture = family.ARCHITECTURES.get(path.parent.parent.name)
        if architecture is None:
            raise BadInput(f"{path.parent.parent.name!r} is no network of `resnet family`, so it cannot be built")
        _, height, width, channels = manifest.input.shape
        model = family.build(architecture, (height, width, channels), manifest.output.shape[1])
    variables = [[one.value for one in some] for some in (model.trainable_variables, model.non_trainable_variables)]
    predict = jax.jit(lambda images: model.stateless_call(*variables, images, training=False)[0])
    for images in TINY_BATCHES if tiny else BATCHES:
        batch = make_batch(manifest, images)
        started = time.monotonic()
        np.asarray(predict(batch))
        start_seconds = time.monotonic() - started
        rates = measure(lambda images: np.asarray(predict(images)), batch, 0.02 if tiny else SECONDS)
        name = f"{path.parent.parent.name} {precision}"
        results.add("loop", file=name, way="Keras on JAX", images=images, rates=rates, start_seconds=start_seconds)


if __name__ == "__main__":
    main()
