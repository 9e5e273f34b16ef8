"""The same command trains on several devices, on several machines, and on another backend."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from resnet import BadInput, cli
from tests.tiny import TRAIN
from training import backend
from training.distribute import choose

ARGUMENTS = ["train", "--data=digits", "--model=tiny", "--epochs=3"]

# Two devices on a machine that has one.
DEVICES = """
from training.backend import start_tensorflow
import os
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
"""


def start(script: str, out: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    """Start a training as a shell would."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *ARGUMENTS, f"--out={out}", *options],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a training, and return what it printed."""
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def metrics(folder: Path) -> dict[str, Any]:
    """Return the metrics of a run."""
    return dict(json.loads((folder / "metrics.json").read_text()))


@pytest.mark.slow
def test_two_devices_share_the_work(tmp_path: Path) -> None:
    """They learn as well as one does, from an odd number of images too, and resume."""
    finish(start(DEVICES + TRAIN, tmp_path / "run", "--distribute=mirrored", "--images=1001", "--epochs=1"))
    output = finish(
        start(DEVICES + TRAIN, tmp_path / "run", "--distribute=mirrored", "--images=1001", "--epochs=3", "--resume")
    )
    assert "splitting every batch of 64 images among 2 devices" in output
    assert "resuming after epoch 1 of 3" in output
    assert metrics(tmp_path / "run")["accuracy"] > 0.4


@pytest.mark.slow
def test_two_machines_share_the_work(tmp_path: Path) -> None:
    """Each ends with the same history and the same weights, but for what batch normalisation saw of its own images."""
    with socket.socket() as first, socket.socket() as second:
        for port in (first, second):
            port.bind(("127.0.0.1", 0))
        workers = [f"127.0.0.1:{port.getsockname()[1]}" for port in (first, second)]
    folders = [tmp_path / "0", tmp_path / "1"]
    processes = [
        start(
            TRAIN,
            folder,
            "--distribute=multiworker",
            TF_CONFIG=json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}),
        )
        for index, folder in enumerate(folders)
    ]
    for process in processes:
        assert "among 2 devices" in finish(process)
    histories = []
    for folder in folders:
        with (folder / "history.csv").open(newline="") as file:
            histories.append([(row["loss"], row["val_accuracy"]) for row in csv.DictReader(file)])
    assert histories[0] == histories[1]
    assert len(histories[0]) == 3
    models = [keras.models.load_model(folder / "model.keras") for folder in folders]
    for left, right in zip(*(model.trainable_weights for model in models), strict=True):
        np.testing.assert_array_equal(left.numpy(), right.numpy())
    for left, right in zip(*(model.non_trainable_weights for model in models), strict=True):
        np.testing.assert_allclose(left.numpy(), right.numpy(), rtol=0.2, atol=0.05)
    assert metrics(folders[0])["accuracy"] > 0.4


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_a_model_trained_on_jax_exports_like_any_other(tmp_path: Path) -> None:
    """With an average of its weights."""
    script = TRAIN.replace("tests.tiny import TINY", "training.model import Architecture").replace(
        "TINY", "Architecture((8, 16), strides=(1, 2), blocks=(1, 1))"
    )
    finish(start(script, tmp_path / "run", "--weight-average=0.5", "--images=512", KERAS_BACKEND="jax"))
    assert metrics(tmp_path / "run")["versions"].keys() >= {"jax"}
    assert metrics(tmp_path / "run")["accuracy"] > 0.3
    assert cli.main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "models" / "digits")]) == 0


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("fma avx512_bf16 avx512_vnni", "mixed_bfloat16"),
        ("amx_tile amx_bf16", "mixed_bfloat16"),
        ("fma avx2", "float32"),
        (None, "float32"),
    ],
)
def test_the_cpu_decides_on_the_precision(
    flags: str | None, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Linux tells of it; elsewhere, with a GPU and on another backend it is float32."""
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"model name: One\nflags\t\t: {flags}\n")
    monkeypatch.setattr(backend, "CPU_INFO", tmp_path / "cpuinfo")
    assert backend.choose_precision() == precision
    monkeypatch.setattr(keras.distribution, "list_devices", lambda kind: [f"{kind}:0"])
    assert backend.choose_precision() == "float32"


def test_a_batch_is_divided_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or refused, in one sentence."""
    strategy = SimpleNamespace(num_replicas_in_sync=2)
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda _: strategy)
    assert choose("mirrored", 64) is strategy
    with pytest.raises(BadInput, match="--batch-size 33 is not a multiple of the 2 devices"):
        choose("mirrored", 33)


def test_several_devices_need_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another backend it is one sentence."""
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(BadInput, match="--distribute needs TensorFlow"):
        choose("mirrored", 64)
