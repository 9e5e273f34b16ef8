"""Images and heads of every kind, from the data to the answers of a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import grpc
import keras
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc

from resnet import cli
from serving.client import Client
from serving.config import Compute, Limits
from serving.models import loader, registry
from serving.server import Server
from training.images import decode
from training.model import ARCHITECTURES, Architecture

SMALLEST = Architecture((4,), strides=(2,), blocks=(1,), stem="cifar")
PIXELS = np.random.default_rng(0).integers(256, size=(16, 6, 7, 4), dtype=np.uint8)


def write_grey_table(folder: Path) -> None:
    """Write grey images and `train.csv`."""
    rows = ["path,label,group"]
    for number, pixels in enumerate(PIXELS):
        Image.fromarray(pixels[..., 0]).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{('no', 'yes')[number % 2]},{number // 2}")
    (folder / "train.csv").write_text("\n".join(rows))


def write_transparent_folder(folder: Path) -> None:
    """Write images with an alpha channel of three classes, none of them for testing."""
    for number, pixels in enumerate(PIXELS):
        (folder / "abc"[number % 3]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "abc"[number % 3] / f"{number}.png")


def ask_kserve(address: str, pixels: NDArray[np.uint8], datatype: str) -> NDArray[np.float32]:
    """Return the probabilities of a tensor, as KServe v2 sends it."""
    values = pixels if datatype == "UINT8" else pixels.astype(np.float32)
    request = service_pb2.ModelInferRequest(model_name="mine", raw_input_contents=[values.tobytes()])
    request.inputs.add(name="image", datatype=datatype, shape=values.shape)
    with grpc.insecure_channel(address) as channel:
        response = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(response.outputs[0].shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "options", "shape", "labels"),
    [
        pytest.param(
            write_grey_table,
            ["--image-size=8x10", "--head=sigmoid", "--batch-size=4"],
            (8, 10, 1),
            ["no", "yes"],
            id="grey, rectangular, one output, from a table",
        ),
        pytest.param(
            write_transparent_folder,
            ["--recipe=hour", "--no-fuse"],
            (6, 7, 4),
            ["a", "b", "c"],
            id="RGBA, from a folder, looked at twice",
        ),
    ],
)
def test_images_and_heads_of_every_kind_are_trained_exported_served_and_classified(
    write: Callable[[Path], None],
    options: list[str],
    shape: tuple[int, int, int],
    labels: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Files and tensors get the answers of the trained model."""
    monkeypatch.setitem(ARCHITECTURES, "smallest", SMALLEST)
    data, run, models = tmp_path / "data", tmp_path / "run", tmp_path / "models"
    data.mkdir()
    write(data)
    train = ["train", f"--data={data}", "--model=smallest", "--epochs=1", f"--out={run}", *options]
    assert cli.main(train) == 0
    assert cli.main(["export", str(run), f"--to={models / 'mine'}"]) == 0
    assert cli.main(["verify", str(models / "mine")]) == 0
    model = keras.models.load_model(run / "model.keras")
    assert model.input_shape[1:] == shape
    assert model.output_shape[1] == (1 if "--head=sigmoid" in options else len(labels))
    with np.load(run / "heldout.npz") as heldout:
        images, targets = heldout["images"], heldout["labels"]
    expected = model.predict(images, verbose=0)
    if expected.shape[1] == 1:
        expected = np.hstack([1 - expected, expected])
    assert json.loads((run / "metrics.json").read_text())["accuracy"] == np.mean(expected.argmax(axis=1) == targets)

    file = next(data.rglob("*.png"))
    pixels = decode(file.read_bytes(), shape[:2], channels=shape[2])[None]
    served = loader.load(models / "mine" / "1", Compute(device="cpu", tune=False))
    with Server(registry.ModelRegistry([served]), "127.0.0.1", 0, Limits()) as server:
        for datatype in ("UINT8", "FP32"):
            np.testing.assert_allclose(ask_kserve(server.address, images, datatype), expected, atol=1e-5)
        with Client(server.address) as client:
            by_file, by_pixels = (client.classify(given).images for given in ([file.read_bytes()], pixels))
        capsys.readouterr()
        assert cli.main(["classify", str(file), f"--server={server.address}", "--json", f"--top-k={len(labels)}"]) == 0
    assert by_file == by_pixels
    (answer,) = json.loads(capsys.readouterr().out)
    found = {item["label"]: item["probability"] for item in answer["classes"]}
    assert sorted(found) == labels
    outputs = model.predict(pixels, verbose=0)[0]
    np.testing.assert_allclose([found[label] for label in labels][-len(outputs) :], outputs, atol=1e-5)
