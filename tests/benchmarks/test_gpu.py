"""The benchmark for GPUs, on the CPU: what it measures there says nothing, that it ends well does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import gpu
from export import manifest


@pytest.mark.slow
def test_a_file_alone_is_measured_and_served(repository: Path, tmp_path: Path) -> None:
    """All it needs is the ONNX file; the table is the last of its output, and the rounds are in gpu.json."""
    file = Path(shutil.copy(repository / "digits" / "1" / "model.onnx", tmp_path))
    options = ["--device=cpu", "--seconds=0.05", "--rounds=2", "--clients=2", f"--out={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "benchmarks.gpu", str(file), *options, "--batches", "1", "3"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert output[0] == f"no certificate for {file}: {tmp_path}/heldout.npz and {tmp_path}/probabilities.npy missing"
    assert [line.split(" | ")[1] for line in output[-2:]] == ["1", "3"]
    content = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [row["images"] for row in content["rows"]] == [1, 3]
    for row in content["rows"]:
        assert {way: len(rounds) for way, rounds in row["rounds"].items()} == dict.fromkeys(
            ("resident", "raw", "engine", "served"), 2
        )


def test_the_raw_loop_computes_the_model(
    repository: Path, heldout: tuple[NDArray[np.uint8], NDArray[np.int32]], probabilities: NDArray[np.float32]
) -> None:
    """Speed of wrong answers would be no measure."""
    version = repository / "digits" / "1"
    loop = gpu.RawLoop(version / "model.onnx", manifest.read(version), (1, 5), "cpu")
    for images in (1, 5):
        np.testing.assert_allclose(loop.run(heldout[0][:images]), probabilities[:images], atol=1e-5)


def test_the_certificate_is_computed_anew(own_repository: Path, probabilities: NDArray[np.float32]) -> None:
    """Against what Keras has answered elsewhere; a figure outside its budget is named."""
    version = own_repository / "digits" / "1"
    np.save(version / "probabilities.npy", probabilities)
    about = manifest.read(version)
    assert "model.onnx on cpu: within its budget" in gpu.certify(version / "model.onnx", about, "cpu")
    np.save(version / "probabilities.npy", probabilities[::-1])
    assert "the largest difference of onnx at batch size 1 is" in gpu.certify(version / "model.onnx", about, "cpu")
