"""Training leaves a complete run folder, and no interruption loses more than an epoch."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

import resnet
from resnet import BadInput
from training.data import Split
from training.run import Run
from training.train import Settings, train

# What a user's shell would start, with the tests' small network in the family.
TRAIN = """
import sys, resnet
from tests.conftest import TINY
from training.model import ARCHITECTURES
ARCHITECTURES["tiny"] = TINY
sys.exit(resnet.main(sys.argv[1:]))
"""


def settings(epochs: int = 2, seed: int = 0) -> Settings:
    """Return settings of a training that takes seconds."""
    return Settings(data="digits", model="tiny", recipe="notebook", epochs=epochs, seed=seed, image_size=None)


def rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of history.csv."""
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_folder_is_complete(run: Path) -> None:
    """Model, history, curves and figures are there, and agree with each other."""
    assert [row["epoch"] for row in rows(run)] == ["1", "2", "3"]
    assert {"accuracy", "loss", "val_accuracy", "val_loss"} < rows(run)[0].keys()
    assert (run / "labels.txt").read_text().split() == [str(digit) for digit in range(10)]
    with Image.open(run / "curves.png") as picture:
        assert picture.width > picture.height > 300
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["settings"]["seed"] == 0
    assert len(metrics["data_sha256"]) == 64
    assert metrics["versions"]["keras"] == keras.__version__
    with np.load(run / "heldout.npz") as heldout:
        answers = keras.models.load_model(run / "model.keras").predict(heldout["images"], verbose=0).argmax(axis=1)
        assert metrics["accuracy"] == np.mean(answers == heldout["labels"])
    assert not list(run.glob(".part-*"))


def test_the_model_learns(run: Path) -> None:
    """Three epochs of the small network are far better than chance, which is 10 %."""
    assert json.loads((run / "metrics.json").read_text())["accuracy"] > 0.5


@pytest.mark.slow
def test_a_killed_run_resumes_and_learns_what_it_would_have_learned(tmp_path: Path) -> None:
    """SIGKILL as the second epoch ends: the resumed run ends with the weights of one that was never interrupted."""
    arguments = ["train", "--data=digits", "--model=tiny", "--epochs=3", f"--out={tmp_path / 'killed'}"]
    process = subprocess.Popen([sys.executable, "-uc", TRAIN, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/3"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(rows(tmp_path / "killed")) in (1, 2)  # the second is being written just then

    train(settings(epochs=3), tmp_path / "killed", resume=True)
    train(settings(epochs=3), tmp_path / "whole")
    assert [row["epoch"] for row in rows(tmp_path / "killed")] == ["1", "2", "3"]
    killed, whole = (keras.models.load_model(tmp_path / name / "model.keras") for name in ("killed", "whole"))
    for left, right in zip(killed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def test_a_row_without_its_checkpoint_is_dropped_on_resuming(tmp_path: Path) -> None:
    """A kill between history and checkpoint must not count an epoch twice."""
    train(settings(epochs=1), tmp_path / "run")
    run = Run(tmp_path / "run")
    history = run.read_history()
    run.write_history([*history, history[0] | {"epoch": 2}])
    train(settings(epochs=2), run.folder, resume=True)
    assert [row["epoch"] for row in rows(run.folder)] == ["1", "2"]


def test_a_folder_in_use_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    """Nor is a run continued with other settings, or a foreign folder resumed."""
    with pytest.raises(BadInput, match="pass --resume"):
        train(settings(), run)
    with pytest.raises(BadInput, match="was started with seed 0, not 1"):
        train(settings(epochs=3, seed=1), run, resume=True)
    with pytest.raises(BadInput, match="may only raise"):
        train(settings(epochs=1), run, resume=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="holds no run to resume"):
        train(settings(), tmp_path, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be used"):
        train(settings(), tmp_path / "file")


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    """Files are replaced whole."""
    path = tmp_path / "history.csv"
    path.write_text("before")

    def write(part: Path) -> None:
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Run.replace(path, write)
    assert path.read_text() == "before"


def test_large_evidence_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out images stay within their limit, image and class together."""
    monkeypatch.setattr("training.run.HELDOUT_BYTES", 12 * 10)
    images = np.arange(40, dtype=np.uint8).repeat(12).reshape(40, 2, 2, 3)
    Run(tmp_path).write_evidence(("a", "b"), Split(images, np.arange(40, dtype=np.int32)))
    with np.load(tmp_path / "heldout.npz") as heldout:
        assert len(heldout["labels"]) == 10
        np.testing.assert_array_equal(heldout["images"][:, 0, 0, 0], heldout["labels"])


def test_too_few_images_leave_no_run_folder(tmp_path: Path) -> None:
    """A tenth of four images is none."""
    for split, name in itertools.product(("train", "test"), ("cat", "dog")):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        for number in (1, 2):
            Image.new("RGB", (32, 32)).save(tmp_path / "data" / split / name / f"{number}.png")
    with pytest.raises(BadInput, match="4 training images are too few to set 10% aside"):
        train(dataclasses.replace(settings(), data=str(tmp_path / "data")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet9"], "--model 'resnet9' is unknown; choose one of resnet18"),
        (["--recipe", "magic"], "--recipe 'magic' is unknown"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--data", "mnist"], "--data 'mnist' is neither"),
    ],
)
def test_bad_options_are_one_sentence_and_write_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and no run folder."""
    assert resnet.main(["train", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
