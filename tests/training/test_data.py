"""Data sets, and what is said about those that cannot be used."""

from __future__ import annotations

import dataclasses
import importlib
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resnet import BadInput
from training import data
from training.data import ImageForm
from training.datasets import cifar10


def write(path: Path, shade: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    """Write a picture of one shade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of two classes, two training images and a test image each."""
    for label, name in enumerate(("cat", "dog")):
        write(tmp_path / "train" / name / "1.png", 10 * label)
        write(tmp_path / "train" / name / "2.jpg", 10 * label + 1)
        write(tmp_path / "test" / name / "1.png", 10 * label + 2)
    return tmp_path


@pytest.mark.parametrize("loader", data.LOADERS, ids=lambda loader: str(loader.meaning))
def test_every_row_of_the_table_has_a_module_and_a_place_in_the_help(loader: data.Loader) -> None:
    """And at least one value of --data means it."""
    assert callable(importlib.import_module(loader.module).load)
    assert loader.name or loader.suffix or loader.holds
    assert loader.meaning in data.SOURCES


def test_digits_are_rgb_images_of_which_a_fifth_is_for_testing() -> None:
    """1,797 images of 32x32 pixels, values from black to white, no image in both splits."""
    digits = data.load("digits")
    assert (len(digits.train.labels), len(digits.test.labels)) == (1437, 360)
    assert digits.image_shape == (32, 32, 3)
    assert (digits.train.images.min(), digits.train.images.max()) == (0, 255)
    train, test = ({image.tobytes() for image in split.images} for split in (digits.train, digits.test))
    assert not train & test


def test_a_folder_is_read_in_the_order_of_its_names(folder: Path) -> None:
    """Classes are the folders' names; labels follow them; hidden files are passed over."""
    (folder / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    dataset = data.load(str(folder))
    assert dataset.classes == ("cat", "dog")
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11]
    assert dataset.test.images[:, 0, 0, 0].tolist() == [2, 12]


def test_the_hash_follows_pixels_labels_names_and_groups(folder: Path) -> None:
    """Equal data have equal hashes; one pixel changes it, and so do groups, which move validation images."""
    dataset = data.load(str(folder))
    before = dataset.sha256
    assert data.load(str(folder)).sha256 == before
    grouped = dataset.train._replace(groups=np.zeros(4, np.int32))
    assert dataclasses.replace(dataset, train=grouped).sha256 != before
    write(folder / "test" / "dog" / "1.png", 99)
    assert data.load(str(folder)).sha256 != before


def test_images_of_several_sizes_are_resized_on_request(folder: Path) -> None:
    """--image-size gives them height and width."""
    write(folder / "train" / "cat" / "3.png", size=(20, 9))
    assert data.load(str(folder), ImageForm((16, 9))).image_shape == (16, 9, 3)


def test_images_that_do_not_fit_memory_are_decoded_when_they_are_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the same images, with the same hash; one that breaks is named when its turn comes."""
    cached = data.load(str(folder))
    monkeypatch.setattr("training.data.CACHE_BYTES", 0)
    dataset = data.load(str(folder))
    assert isinstance(dataset.train.images, data.FileImages)
    assert dataset.image_shape == cached.image_shape
    chosen = np.array([3, 0, 3])
    np.testing.assert_array_equal(dataset.train.images[chosen], cached.train.images[chosen])
    assert dataset.sha256 == cached.sha256
    _truncate(folder)
    with pytest.raises(BadInput, match="train/dog/2.jpg is a broken image"):
        list(dataset.train.chunks())


def arrays(**changed: Any) -> dict[str, Any]:
    """Return what Keras' loaders return, by name."""
    images = np.arange(4, dtype=np.uint8).repeat(8 * 8 * 3).reshape(4, 8, 8, 3)
    labels = np.array([[0], [1], [2], [1]])
    return {"x_train": images, "y_train": labels, "x_test": images[:3], "y_test": labels[:3]} | changed


def test_arrays_are_read_from_an_npz_file(tmp_path: Path) -> None:
    """Classes are numbers, unless the file names them, or is called as CIFAR-10 is."""
    np.savez(tmp_path / "mine.npz", **arrays())
    dataset = data.load(str(tmp_path / "mine.npz"))
    assert dataset.classes == ("0", "1", "2")
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert dataset.train.labels.tolist() == [0, 1, 2, 1]
    np.savez(tmp_path / "named.npz", **arrays(classes=["cat", "dog", "emu"]))
    assert data.load(str(tmp_path / "named.npz")).classes == ("cat", "dog", "emu")
    np.savez(tmp_path / "named.npz", **arrays(classes=["café".encode(), b"dog", b"emu"]))
    assert data.load(str(tmp_path / "named.npz")).classes == ("café", "dog", "emu")
    np.savez(tmp_path / "cifar10.npz", **arrays())
    assert data.load(str(tmp_path / "cifar10.npz")).classes == cifar10.CLASSES


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_test": np.zeros((3, 8, 8, 2), np.uint8)}, r"x_test must be uint8 .* with 1, 3 or 4 channels"),
        ({"x_test": np.zeros((3, 8, 8, 4), np.uint8)}, "x_train and x_test differ in size or colours"),
        ({"x_train": np.zeros((4, 8, 8, 3))}, "x_train must be uint8"),
        ({"x_test": np.zeros((3, 9, 9, 3), np.uint8)}, "x_train and x_test differ in size"),
        ({"y_train": [0, 1]}, "y_train must be 4 integers"),
        ({"y_test": [0, 1, 3], "classes": ["a", "b"]}, "labels from 0 to 3 for 2 classes"),
        ({"y_train": [0] * 4, "y_test": [0] * 3}, "for 1 classes; it needs two"),
        ({"y_train": [0, 1, 2, 2**32]}, "labels from 0 to 4294967296 for 65536 classes"),
        ({"y_train": np.array([0, 1, 2, 2**64 - 1], np.uint64)}, "labels from 0 to 18446744073709551615 for"),
        ({"y_train": [0, 1, 2, -1]}, "labels from -1 to 2 for 3 classes"),
        ({"x_train": np.zeros((4, 8, 0, 3), np.uint8)}, "the images of x_train have no pixels"),
        ({"classes": "cat"}, r"classes must be a list of names \(it is <U3 \[\]\)"),
        ({"classes": [["cat"], ["dog"], ["emu"]]}, r"classes must be a list of names \(it is <U3 \[3, 1\]\)"),
        ({"classes": [0.5, 1.5, 2.5]}, r"classes must be a list of names \(it is float64 \[3\]\)"),
        ({"classes": [b"\xff", b"b", b"c"]}, "classes must be a list of names .*can't decode"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    """The message names the array."""
    np.savez(tmp_path / "mine.npz", **arrays(**changed))
    with pytest.raises(BadInput, match=message):
        data.load(str(tmp_path / "mine.npz"))


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 4)])
def test_arrays_keep_their_channels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Those of MNIST have no axis of colours; on request they are converted as files are."""
    images = np.random.default_rng(0).integers(256, size=(4, *shape), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", **arrays(x_train=images, x_test=images[:3]))
    kept = np.asarray(data.load(str(tmp_path / "mine.npz")).train.images)
    np.testing.assert_array_equal(kept, images.reshape(4, 8, 8, -1))
    converted = data.load(str(tmp_path / "mine.npz"), ImageForm(channels=3))
    assert converted.test.images.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(
        converted.train.images, images[..., :3] if shape[2:] == (4,) else kept.repeat(3, axis=3)
    )


@pytest.mark.parametrize(
    ("modes", "channels"),
    [(("L", "1", "L"), 1), (("LA", "RGBA", "LA"), 4), (("L", "RGB", "L"), 3), (("L", "L", "LA"), 3)],
)
def test_the_channels_are_those_of_all_files(tmp_path: Path, modes: Sequence[str], channels: int) -> None:
    """Of training and of test images; what differs among them becomes RGB, and so does what is asked to be."""
    for split, mode in zip(("train/cat", "train/dog", "test/cat"), modes, strict=True):
        write(tmp_path / split / "1.png", 7, mode=mode)
    write(tmp_path / "test" / "dog" / "1.png", 7, mode=modes[0])
    dataset = data.load(str(tmp_path))
    assert dataset.train.images.shape == (2, 8, 8, channels)
    assert dataset.test.images.shape == (2, 8, 8, channels)
    assert data.load(str(tmp_path), ImageForm(channels=3)).image_shape == (8, 8, 3)


def test_a_folder_without_test_images_is_split_by_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fifth of each class, at least one image, the same every time; it may lie in a folder of an archive."""
    for name, count in (("cat", 10), ("a dog", 2)):
        for number in range(count):
            write(tmp_path / "archive" / "pets" / name / str(number % 3) / f"{number}.png", number)
    first, second = data.load(str(tmp_path)), data.load(str(tmp_path / "archive" / "pets"))
    assert first.classes == ("a dog", "cat")
    assert np.bincount(first.test.labels).tolist() == [1, 2]
    assert np.bincount(first.train.labels).tolist() == [1, 8]
    assert (first.sha256, first.train.paths) == (second.sha256, second.train.paths)
    assert not {*(first.train.paths or ())} & {*(first.test.paths or ())}
    said = "pets names no test images: 3 of 12 images are for testing, chosen from each class by the seed 0\n"
    assert capsys.readouterr().out.count(said) == 2


def test_what_systems_leave_in_folders_is_no_image(folder: Path) -> None:
    """Nor a class."""
    before = data.load(str(folder)).sha256
    (folder / "train" / "__MACOSX").mkdir()
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (folder / "train" / "cat" / name).write_text("x")
    assert data.load(str(folder)).sha256 == before


def test_accents_make_no_two_classes(folder: Path) -> None:
    """Names that look alike are an error."""
    for name in ("K\u00e4se", "Ka\u0308se"):
        shutil.copytree(folder / "train" / "cat", folder / "train" / name)
        shutil.copytree(folder / "test" / "cat", folder / "test" / name)
    with pytest.raises(BadInput, match="has the class 'K\u00e4se' twice"):
        data.load(str(folder))


def test_a_folder_of_training_images_gives_its_test_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What else is beside it is named, because it is not used."""
    for name in ("train/cat/1", "train/cat/2", "train/dog/1", "train/dog/2", "val/cat/1"):
        write(tmp_path / f"{name}.png")
    dataset = data.load(str(tmp_path))
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (2, 2)
    assert "has train; not used are its folders val\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "two\nlines", "two\u2028lines", "tail\r", "\udcff", "\x1b[31mred"])
def test_names_that_cannot_be_a_line_of_text_are_refused(tmp_path: Path, name: str) -> None:
    """Before a training that could not be exported: the names are written to labels.txt, one per line."""
    with pytest.raises(BadInput, match=r"has the class .*; a name is one line of text"):
        data.check_names(("cat", name), "mine")
    np.savez(tmp_path / "mine.npz", **arrays(classes=["cat", "two\nlines", "emu"]))
    with pytest.raises(BadInput, match=r"'mine' has the class 'two\\nlines'; a name is one line"):
        data.load(str(tmp_path / "mine.npz"))


def test_a_name_stands_for_one_class(tmp_path: Path) -> None:
    """Twice the same would be one entry of the accuracies by class."""
    np.savez(tmp_path / "mine.npz", **arrays(classes=["cat", "dog", "cat"]))
    with pytest.raises(BadInput, match="'mine' has the class 'cat' twice"):
        data.load(str(tmp_path / "mine.npz"))


def test_images_in_folders_of_a_class_belong_to_it(folder: Path) -> None:
    """At any depth, in the order of their paths; hidden folders are passed over."""
    write(folder / "train" / "cat" / "1" / "deep" / "a.png", 5)
    write(folder / "train" / "cat" / ".cache" / "a.png", 99)
    assert data.load(str(folder)).train.images[:, 0, 0, 0].tolist() == [5, 0, 1, 10, 11]


def test_a_file_without_the_arrays_is_refused(tmp_path: Path) -> None:
    """Be it another archive or none at all."""
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(BadInput, match="has no array 'x_test'"):
        data.load(str(tmp_path / "other.npz"))
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(BadInput, match="text.npz cannot be read"):
        data.load(str(tmp_path / "text.npz"))


def test_a_local_copy_of_cifar10_is_read(tmp_path: Path) -> None:
    """The distribution's rows are planar: 1,024 red values, then green, then blue."""
    row = np.repeat(np.array([1, 2, 3], np.uint8), 1024)
    for name in (*cifar10.TRAINING_BATCHES, cifar10.TEST_BATCH):
        (tmp_path / name).write_bytes(pickle.dumps({b"data": np.stack([row, row]), b"labels": [3, 4]}))
    dataset = data.load(str(tmp_path))
    assert dataset.train.images.shape == (10, 32, 32, 3)
    assert dataset.test.images[0, 31, 31].tolist() == [1, 2, 3]
    assert dataset.classes[dataset.test.labels[0]] == "cat"


def test_a_download_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras raises a bare Exception then; the message says how to do without a network."""

    def fail() -> None:
        raise Exception("URL fetch failure")

    monkeypatch.setattr("keras.datasets.cifar10.load_data", fail)
    with pytest.raises(BadInput, match=r"could not be downloaded \(URL fetch failure\); --data also takes a folder"):
        data.load("cifar10")


def test_a_broken_cifar10_batch_is_named(tmp_path: Path) -> None:
    """A download that was cut short is one sentence."""
    (tmp_path / cifar10.TRAINING_BATCHES[0]).write_bytes(b"\x80\x04")
    with pytest.raises(BadInput, match="data_batch_1 is not a CIFAR-10 batch"):
        data.load(str(tmp_path))


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, r"uint8 \[2, 3072\] for 1 labels"),
        ({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}, r"float64 \[2, 3072\] for 2 labels"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 99]}, "labels from 1 to 99"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, "zero-size array"),
        ([1, 2], "list indices"),
    ],
)
def test_a_cifar10_batch_of_another_kind_is_named(tmp_path: Path, batch: object, reason: str) -> None:
    """Before a training that would fail or learn nonsense."""
    (tmp_path / cifar10.TRAINING_BATCHES[0]).write_bytes(pickle.dumps(batch))
    with pytest.raises(BadInput, match=f"data_batch_1 is not a CIFAR-10 batch \\(.*{reason}.*\\); unpack"):
        data.load(str(tmp_path))


def _remove_test(folder: Path) -> None:
    for path in (folder / "test" / "dog").iterdir():
        path.unlink()


def _name_splits(folder: Path) -> None:
    (folder / "train").rename(folder / "Training")
    (folder / "test").rename(folder / "val")


def _link(folder: Path) -> None:
    (folder / "train" / "cat" / "loop").symlink_to(folder / "train", target_is_directory=True)


def _truncate(folder: Path) -> None:
    path = folder / "train" / "dog" / "2.jpg"
    path.write_bytes(path.read_bytes()[:200])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a class without images": (_remove_test, "test/dog holds no images"),
    "a truncated image": (_truncate, "train/dog/2.jpg is a broken image"),
    "a text file": (lambda folder: (folder / "test" / "cat" / "a.txt").write_text("x"), "a.txt is not a JPEG or PNG"),
    "a size of its own": (lambda folder: write(folder / "test" / "cat" / "9.png", size=(9, 8)), "pass --image-size"),
    "training images by another name": (
        lambda folder: (folder / "train").rename(folder / "val"),
        "but none named train",
    ),
    "splits by other names": (_name_splits, "the folders Training and val, which are no classes; name them train and"),
    "no folder to test a class": (lambda folder: shutil.rmtree(folder / "test" / "dog"), "test has no folder 'dog'"),
    "a loop": (_link, "train/cat/loop is a link to a folder that it is in"),
    "a class for testing only": (lambda folder: write(folder / "test" / "emu" / "1.png"), "the class 'emu'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_refused_with_the_place_of_the_fault(folder: Path, fault: str) -> None:
    """The message names the file or folder at fault."""
    plant, message = FAULTS[fault]
    plant(folder)
    with pytest.raises(BadInput, match=message):
        data.load(str(folder))


def test_unknown_empty_and_one_class_data_are_refused(tmp_path: Path) -> None:
    """There must be two classes to tell apart."""
    with pytest.raises(
        BadInput, match="--data 'mnist' is unknown; choose one of: digits, cifar10, .* a folder of images"
    ):
        data.load("mnist")
    for missing in ("mine.csv", str(tmp_path / "nowhere"), ""):
        with pytest.raises(
            BadInput, match=f"--data '{missing}' {'does not exist' if missing else 'is unknown'}; choose"
        ):
            data.load(missing)
    with pytest.raises(BadInput, match="two or more classes; it has 0"):
        data.load(str(tmp_path))
    write(tmp_path / "cat" / "1.png")
    with pytest.raises(BadInput, match="two or more classes; it has 1"):
        data.load(str(tmp_path))
    write(tmp_path / "dog" / "1.png")
    with pytest.raises(BadInput, match="none can be chosen: every class has one image only"):
        data.load(str(tmp_path))
