"""Training leaves a complete run folder, and no interruption loses more than an epoch."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from resnet import BadInput, CheckFailed, cli
from tests.tiny import TINY, TRAIN
from training.batches import TrainingBatches
from training.checkpoints import Checkpoints
from training.data import Dataset, Split
from training.evaluation import evaluate
from training.model import ARCHITECTURES
from training.recipes import RECIPES
from training.run_folder import RunFolder
from training.train import TrainingSettings, _balance, train


def settings(epochs: int = 2, seed: int = 0, images: int | None = None, **values: Any) -> TrainingSettings:
    """Return settings of a training that takes seconds."""
    recipe = dataclasses.replace(RECIPES["notebook"], epochs=epochs, **values)
    return TrainingSettings(data="digits", model="tiny", recipe=recipe, seed=seed, images=images)


def weights(folder: Path) -> list[NDArray[np.float32]]:
    """Return the weights of a trained model."""
    return list(keras.models.load_model(folder / "model.keras").get_weights())


def rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of history.csv."""
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_folder_is_complete(run: Path) -> None:
    """Model, history, curves and figures are there, and agree with each other."""
    assert [row["epoch"] for row in rows(run)] == ["1", "2", "3"]
    assert {"accuracy", "loss", "val_accuracy", "val_loss", "learning_rate", "seconds"} < rows(run)[0].keys()
    assert (run / "labels.txt").read_text().split() == [str(digit) for digit in range(10)]
    for name in ("curves.png", "mistakes.png", "reliability.png"):
        with Image.open(run / name) as picture:
            assert picture.width >= picture.height > 300
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["settings"]["seed"] == 0
    assert len(metrics["data_sha256"]) == 64
    assert metrics["versions"]["keras"] == keras.__version__
    with np.load(run / "heldout.npz") as heldout:
        answers = keras.models.load_model(run / "model.keras").predict(heldout["images"], verbose=0).argmax(axis=1)
        assert metrics["accuracy"] == np.mean(answers == heldout["labels"])
        sevens = heldout["labels"] == 7
        assert metrics["class_accuracy"]["7"] == np.mean(answers[sevens] == 7)
    assert not list(run.glob(".part-*"))


def test_the_model_learns(run: Path) -> None:
    """Three epochs of the small network are far better than chance, which is 10 %."""
    assert json.loads((run / "metrics.json").read_text())["accuracy"] > 0.5


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start a training of four epochs into `folder` as a shell would."""
    arguments = ["train", "--data=digits", "--model=tiny", "--epochs=4", f"--out={folder}", *options]
    return subprocess.Popen([sys.executable, "-uc", TRAIN, *arguments], stdout=subprocess.PIPE, text=True)


def kill(folder: Path, after: str, *options: str) -> None:
    """Start a training, and kill it as it prints `after`."""
    process = start(folder, *options)
    assert process.stdout is not None
    assert any(line.startswith(after) for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.slow
def test_a_run_killed_twice_resumes_and_learns_what_it_would_have_learned(tmp_path: Path) -> None:
    """Optimizer, schedule, average and history go on: the weights are those of a run that was never interrupted."""
    # As it says the size of the model, and while an epoch is being written.
    folder, options = tmp_path / "killed", ["--recipe=modern", "--images=400", "--no-fuse"]
    kill(folder, "tiny: ", *options)
    assert not (folder / "history.csv").exists()
    kill(folder, "epoch 3/4", "--resume", *options)
    assert len(rows(folder)) in (2, 3)  # the third is being written just then

    for process in (start(folder, "--resume", *options), start(tmp_path / "whole", *options)):
        process.communicate()
        assert process.returncode == 0
    assert [row["epoch"] for row in rows(folder)] == ["1", "2", "3", "4"]
    for left, right in zip(weights(folder), weights(tmp_path / "whole"), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def test_equal_settings_learn_equal_weights(run: Path, tmp_path: Path) -> None:
    """To the last bit, on one machine; another seed learns others."""
    train(settings(epochs=3, calibrate=True), tmp_path / "again")
    for left, right in zip(weights(run), weights(tmp_path / "again"), strict=True):
        np.testing.assert_array_equal(left, right)
    train(
        settings(epochs=3, calibrate=True), tmp_path / "again", resume=True
    )  # there is nothing left to do, and nothing changes
    np.testing.assert_array_equal(weights(run)[0], weights(tmp_path / "again")[0])
    train(settings(epochs=1, seed=1, calibrate=True), tmp_path / "other")
    assert not np.array_equal(weights(run)[0], weights(tmp_path / "other")[0])


def test_patience_stops_early_and_keeps_the_best(tmp_path: Path) -> None:
    """A learning rate of zero never gets better: the first epoch is the best, and one more is waited for."""
    metrics = train(settings(epochs=9, learning_rate=0.0, patience=1), tmp_path / "run")
    assert metrics["epochs"] == len(rows(tmp_path / "run")) == 2
    best = keras.models.load_model(tmp_path / "run" / "best.keras").get_weights()
    for left, right in zip(weights(tmp_path / "run"), best, strict=True):
        np.testing.assert_array_equal(left, right)
    resumed = train(settings(epochs=9, learning_rate=0.0, patience=1), tmp_path / "run", resume=True)
    assert resumed["epochs"] == 2
    assert resumed["accuracy"] == metrics["accuracy"]


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says which epoch is safe, and what to try."""
    train(settings(epochs=1, images=128), tmp_path / "run")
    checkpoint = (tmp_path / "run" / "checkpoint.keras").read_bytes()
    with monkeypatch.context() as patch:
        healthy = TrainingBatches.__getitem__
        patch.setattr(TrainingBatches, "__getitem__", lambda *at: (healthy(*at)[0], healthy(*at)[1] * np.nan))
        with pytest.raises(CheckFailed, match="became nan in step 1 of epoch 2; .* holds epoch 1"):
            train(settings(epochs=2, images=128), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "checkpoint.keras").read_bytes() == checkpoint
    assert len(rows(tmp_path / "run")) == 1
    with pytest.raises(CheckFailed, match="no epoch was finished"):
        train(settings(learning_rate=1e30, images=256), tmp_path / "other")


def test_the_model_of_an_average_is_the_average(tmp_path: Path) -> None:
    """After one epoch from random weights an average that keeps nearly all of them is not what was learned last."""
    train(settings(epochs=1, weight_average=0.9), tmp_path / "average")
    train(settings(epochs=1), tmp_path / "last")
    average, last = weights(tmp_path / "average"), weights(tmp_path / "last")
    checkpoint = keras.models.load_model(tmp_path / "average" / "checkpoint.keras")
    for left, right in zip(checkpoint.get_weights(), last, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)  # the path is the same
    assert not np.allclose(average[0], last[0], atol=1e-4)
    with np.load(tmp_path / "average" / "heldout.npz") as heldout:
        best = keras.models.load_model(tmp_path / "average" / "best.keras")
        model = keras.models.load_model(tmp_path / "average" / "model.keras")
        np.testing.assert_array_equal(*(np.asarray(network(heldout["images"][:9])) for network in (best, model)))


def test_mixed_precision_leaves_a_float32_model(tmp_path: Path) -> None:
    """The weights always were; the saved graph computes in float32 too, so that an export proves what it serves."""
    train(settings(epochs=1, precision="mixed_bfloat16", images=128), tmp_path / "run")
    checkpoint = keras.models.load_model(tmp_path / "run" / "checkpoint.keras")
    assert checkpoint.get_layer("stem_conv").compute_dtype == "bfloat16"
    model = keras.models.load_model(tmp_path / "run" / "model.keras")
    assert {layer.compute_dtype for layer in model.layers} <= {"float32", "uint8"}


def test_class_weights_count_rare_classes_as_much_as_common_ones() -> None:
    """Inverse to the frequency; the mean over the images is 1."""
    assert _balance(np.array([0, 0, 0, 1], np.int32), True) == {0: pytest.approx(2 / 3), 1: 2.0}
    assert _balance(np.array([2, 5], np.int32), True) == {2: 1.0, 5: 1.0}


def test_class_weights_and_tensorboard_train(tmp_path: Path) -> None:
    """The curves are there for TensorBoard too."""
    train(settings(epochs=1, class_weights=True, images=256), tmp_path / "run", tensorboard=True)
    assert {path.name for path in (tmp_path / "run" / "tensorboard").iterdir()} == {"train", "validation"}


def test_a_schedule_is_not_bent_by_more_epochs(tmp_path: Path) -> None:
    """A constant rate may go on for longer, a cosine that has reached zero may not."""
    train(settings(epochs=1, schedule="cosine", images=128), tmp_path / "run")
    with pytest.raises(BadInput, match="was started with epochs 1, not 2"):
        train(settings(epochs=2, schedule="cosine", images=128), tmp_path / "run", resume=True)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    """The second epoch's checkpoint does not fit: the first one's is still whole, and no part of a file is left."""
    arguments = ["train", "--data=digits", "--model=tiny", "--images=128", f"--out={tmp_path / 'run'}"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
    train(settings(epochs=1, images=128), tmp_path / "run")
    checkpoint = (tmp_path / "run" / "checkpoint.keras").read_bytes()
    assert len(checkpoint) > 60_000
    (tmp_path / "run" / "settings.json").write_text(
        (tmp_path / "run" / "settings.json").read_text().replace('"epochs": 1', '"epochs": 2')
    )
    full = subprocess.run(
        [sys.executable, "-c", limit + TRAIN, *arguments, "--epochs=2", "--resume"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert full.returncode == 2
    assert full.stderr.strip().splitlines()[-1].startswith("resnet train: ")
    assert "Traceback" not in full.stderr
    assert (tmp_path / "run" / "checkpoint.keras").read_bytes() == checkpoint
    assert not list((tmp_path / "run").glob(".part-*"))


@pytest.mark.slow
def test_images_of_224_pixels_train(tmp_path: Path) -> None:
    """A folder of pictures of several sizes, resized on reading, and decoded anew in every epoch."""
    rng = np.random.default_rng(0)
    for split, name, number in itertools.product(("train", "test"), ("cat", "dog"), range(16)):
        path = tmp_path / "data" / split / name / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(256, size=(200 + number, 240, 3), dtype=np.uint8)
        Image.fromarray(noise // (1 if name == "cat" else 4)).save(path)
    made = dataclasses.replace(settings(epochs=3, batch_size=8), data=str(tmp_path / "data"), image_size="224")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.data.CACHE_BYTES", 0)
        # On CPUs with AVX-512, TensorFlow 2.21 crashes in the gradient of a 1x1 convolution of stride 2 that reads
        # 8 channels of 56x56 pixels, which no network of the family has but this small one.
        patch.setitem(ARCHITECTURES, "tiny", TINY._replace(filters=(16, 32)))
        metrics = train(made, tmp_path / "run")
    assert metrics["images"] == {"train": 32, "test": 32}
    assert keras.models.load_model(tmp_path / "run" / "model.keras").input_shape == (None, 224, 224, 3)


def test_a_row_without_its_checkpoint_is_dropped_on_resuming(tmp_path: Path) -> None:
    """A kill between history and checkpoint must not count an epoch twice."""
    train(settings(epochs=1), tmp_path / "run")
    run_folder = RunFolder(tmp_path / "run")
    history = run_folder.read_history()
    run_folder.write_history([*history, history[0] | {"epoch": 2}])
    train(settings(epochs=2), run_folder.folder, resume=True)
    assert [row["epoch"] for row in rows(run_folder.folder)] == ["1", "2"]


def test_a_folder_in_use_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    """Nor is a run continued with other settings, or a foreign folder resumed."""
    with pytest.raises(BadInput, match="pass --resume"):
        train(settings(), run)
    with pytest.raises(BadInput, match="was started with seed 0, not 1"):
        train(settings(epochs=3, seed=1, calibrate=True), run, resume=True)
    with pytest.raises(BadInput, match="can only raise"):
        train(settings(epochs=1, calibrate=True), run, resume=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="holds no run to resume"):
        train(settings(), tmp_path, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be used"):
        train(settings(), tmp_path / "file")


@pytest.mark.parametrize("content", ["epoch,loss\n1,abc\n", "epoch,loss\n1\n", "epoch,loss\n1,2,3\n"])
def test_a_history_that_was_spoiled_is_one_sentence(tmp_path: Path, content: str) -> None:
    """With the way out."""
    (tmp_path / "history.csv").write_text(content)
    with pytest.raises(BadInput, match=r"history.csv cannot be read \(.*\); restore it, or choose another folder"):
        RunFolder(tmp_path).read_history()


@pytest.mark.parametrize("content", ["[]", "{}", "1", '{"epochs": "2"}'])
def test_settings_that_are_none_are_one_sentence(tmp_path: Path, content: str) -> None:
    """They cannot be compared."""
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(BadInput, match="settings.json holds no settings of a run; choose another folder"):
        train(settings(), tmp_path, resume=True)


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    """Files are replaced whole."""
    path = tmp_path / "history.csv"
    path.write_text("before")

    def write(part: Path) -> None:
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        RunFolder.replace(path, write)
    assert path.read_text() == "before"


def test_model_and_metrics_are_written_before_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a kill while they are drawn, which takes the longest with many classes, costs only them."""
    monkeypatch.setattr("training.train.plot_confusion", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(settings(epochs=1, images=128), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"] == 1
    assert (tmp_path / "run" / "model.keras").exists()


def test_a_class_without_test_images_has_no_accuracy(tmp_path: Path) -> None:
    """It is null in metrics.json, because JSON has no NaN; so is a loss that is none."""
    probabilities = np.array([[1, 0], [0, 1]], np.float32)
    metrics = evaluate(probabilities, np.array([0, 0], np.int32), ("cat", "dog"), None)
    assert metrics["class_accuracy"] == {"cat": 0.5, "dog": None}
    assert metrics["accuracy"] == 0.5
    RunFolder(tmp_path).write_metrics(metrics | {"loss": math.nan})
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == metrics | {"loss": None}


def test_large_evidence_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out images stay within their limit, image and class together."""
    monkeypatch.setattr("training.run_folder.HELDOUT_BYTES", 12 * 10)
    images = np.arange(40, dtype=np.uint8).repeat(12).reshape(40, 2, 2, 3)
    split = Split(images, np.arange(40, dtype=np.int32))
    RunFolder(tmp_path).write_evidence(Dataset("numbers", ("a", "b"), split, split))
    with np.load(tmp_path / "heldout.npz") as heldout:
        assert len(heldout["labels"]) == 10
        np.testing.assert_array_equal(heldout["images"][:, 0, 0, 0], heldout["labels"])


def test_too_few_images_leave_no_run_folder(tmp_path: Path) -> None:
    """A tenth of four images is none."""
    for split, name in itertools.product(("train", "test"), ("cat", "dog")):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        for number in (1, 2):
            Image.new("RGB", (32, 32)).save(tmp_path / "data" / split / name / f"{number}.png")
    with pytest.raises(BadInput, match="4 training images are too few for a validation share of 10%"):
        train(dataclasses.replace(settings(), data=str(tmp_path / "data")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    """--out is a flag that has no default."""
    assert cli.main(["train", "--data", "digits"]) == 2
    assert "arguments are required: --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet9"], "--model 'resnet9' is unknown; choose one of resnet18"),
        (["--image-size", "64"], "--image-size is for image files; 'digits' has 32x32 pixels"),
        (["--image-size", "64x"], "--image-size must be N or HxW"),
        (["--colors", "cmyk"], "--colors must be one of grey, rgb, rgba, not 'cmyk'"),
        (["--head", "sigmoid"], "--head sigmoid is for two classes, and the data have 10"),
        (["--distribute", "magic"], "--distribute must be one of mirrored, multiworker, not 'magic'"),
        (["--distribute", "multiworker"], "needs TF_CONFIG"),
        (["--images", "0"], "--images must be at least 1"),
        (
            ["--recipe", "magic"],
            "--recipe must be one of notebook, paper, quick, hour, modern, finetune, quantize, not 'magic'",
        ),
        (["--validation", "0"], "--validation must be from 0.001 to 0.9"),
        (["--epochs", "0"], "--epochs must be from 1 to 1000000"),
        (["--seed", "-1"], "--seed must be from 0 to 4294967295"),
        (["--data", "mnist"], "--data 'mnist' is unknown"),
    ],
)
def test_bad_options_are_one_sentence_and_write_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and no run folder."""
    assert cli.main(["train", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_cluster_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorFlow says what is wrong with TF_CONFIG."""
    monkeypatch.setenv("TF_CONFIG", "machines")
    assert cli.main(["train", "--data=digits", "--distribute=multiworker", "--out", str(tmp_path / "run")]) == 2
    assert "TF_CONFIG cannot be used (Expecting value: line 1 column 1 (char 0))" in capsys.readouterr().err


def test_of_equal_accuracies_the_lower_loss_is_better(tmp_path: Path) -> None:
    """Few validation images are classified as well in many epochs, the first time by chance."""
    network, best = (keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]) for _ in range(2))
    batches: Any = None
    checkpoints = Checkpoints(RunFolder(tmp_path), [], batches, 2, best)
    checkpoints.set_model(network)
    for value, (accuracy, loss, kept) in enumerate([(0.9, 0.8, True), (0.9, 0.3, True), (0.9, 0.3, False)]):
        network.set_weights([np.full((1, 1), value), np.zeros(1)])
        checkpoints.on_test_end({"accuracy": accuracy, "loss": loss})
        checkpoints.rows.append({"val_accuracy": accuracy, "val_loss": loss})
        saved = keras.models.load_model(tmp_path / "best.keras").layers[0].kernel.numpy().item()
        assert (saved == value) is kept
    assert not checkpoints.exhausted
    checkpoints.rows.append({"val_accuracy": 0.8, "val_loss": 0.1})
    assert checkpoints.exhausted
