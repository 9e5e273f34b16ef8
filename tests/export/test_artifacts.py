"""What an export leaves is for everybody: the libraries that made the formats load it, without any code of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

LOADERS = {
    "saved_model": """
import tensorflow as tf
call = tf.saved_model.load(version).signatures["serving_default"]
assert list(call.structured_input_signature[1]) == ["image"]
probabilities = call(image=tf.constant(images))["probabilities"].numpy()
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(version + "/model.onnx", providers=["CPUExecutionProvider"])
(probabilities,) = session.run(["probabilities"], {"image": images})
""",
    "keras": """
import keras
probabilities = keras.models.load_model(version + "/model.keras").predict(images, verbose=0)
""",
}
FRAME = """
import sys
import numpy as np
version, images = sys.argv[1], np.load(sys.argv[2])
{load}
ours = {{"resnet", "training", "export", "serving", "protos", "benchmarks"}} & sys.modules.keys()
assert not ours, ours
np.save(sys.argv[3], probabilities)
"""


@pytest.mark.slow
@pytest.mark.parametrize("artifact", LOADERS)
def test_an_artifact_needs_none_of_our_code(
    artifact: str,
    repository: Path,
    heldout: tuple[NDArray[np.uint8], NDArray[np.int32]],
    probabilities: NDArray[np.float32],
    tmp_path: Path,
) -> None:
    """In a process that imports nothing of ours it answers what the original answers."""
    source, target = tmp_path / "images.npy", tmp_path / "probabilities.npy"
    np.save(source, heldout[0][:50])
    code = FRAME.format(load=LOADERS[artifact])
    arguments = [str(repository / "digits" / "1"), str(source), str(target)]
    subprocess.run([sys.executable, "-I", "-c", code, *arguments], check=True)
    np.testing.assert_allclose(np.load(target), probabilities[:50], atol=1e-5)
