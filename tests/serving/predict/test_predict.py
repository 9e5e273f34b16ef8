"""`resnet predict`: every source and format, images that cannot be read, runs that end early, and bad input."""

from __future__ import annotations

import csv
import errno
import fcntl
import itertools
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

import serving.predict
from resnet import BadInput, cli
from serving.config import Compute
from serving.predict import sources
from serving.predict.formats import CsvFormat
from serving.predict.job import PredictionJob
from serving.predict.journal import Journal
from serving.predict.prefetch import prefetch
from tests.remote import upload
from tests.serving.predict import data
from tests.versions import COLORS, write_version

SLOW_PARQUET = pytest.param("parquet", marks=pytest.mark.slow)  # to import pyarrow takes a second
CPU = Compute(device="cpu", tune=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that names colours."""
    return write_version(tmp_path_factory.mktemp("models") / "colors" / "1").parent


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four images, so that ten make three."""
    monkeypatch.setattr(sources, "SHARD", 4)


def predict(model: Path, place: str, to: Path, resume: bool = False, **options: Any) -> list[dict[str, str]]:
    """Return the rows of a prediction as CSV."""
    PredictionJob([place], model, str(to), compute=CPU, **options).run(resume)
    return read(to)


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "write", [*data.SOURCES, *(pytest.param(write, marks=pytest.mark.slow) for write in data.TABLES)]
)
def test_every_source_gives_its_images_in_order(write: Callable[[Path], str], model: Path, tmp_path: Path) -> None:
    """Each with a name of its own, and no error."""
    rows = predict(model, write(tmp_path / "data"), tmp_path / "out.csv")
    assert [row["label"] for row in rows] == data.LABELS
    assert len({row["path"] for row in rows}) == len(rows)
    assert not any(row["error"] for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out.csv"}


@pytest.mark.parametrize(
    "write", [*data.SOURCES, *(pytest.param(write, marks=pytest.mark.slow) for write in data.TABLES)]
)
def test_only_files_are_decoded(write: Callable[[Path], str], tmp_path: Path) -> None:
    """Pixels need nothing that decodes."""
    shards = sources.find_shards(sources.find_files([write(tmp_path / "data")]), data.PIXELS.shape[1:])
    encoded = sources.count_encoded(shards)
    if write in (data.write_array, data.write_arrays, data.write_pixel_table):
        assert encoded == 0
    else:
        assert encoded == (len(data.LABELS) if write is not data.write_compressed_tar else sources.SHARD)


@pytest.mark.slow
@pytest.mark.parametrize("write", [data.write_folder, data.write_tar, data.write_table, data.write_array])
def test_urls_are_read_and_written(write: Callable[[Path], str], model: Path, tmp_path: Path) -> None:
    """Through fsspec."""
    memory = pytest.importorskip("fsspec", reason="the extra 'storage' is not installed").filesystem("memory")
    local = Path(write(tmp_path / "data"))
    memory.put(str(local), "/in/" + local.name, recursive=True)
    PredictionJob([f"memory://in/{local.name}"], model, "memory://out.csv", compute=CPU).run()
    lines = memory.cat("/out.csv").decode().splitlines()
    memory.rm("/", recursive=True)
    assert [line.split(",")[1] for line in lines[1:]] == data.LABELS
    assert lines[1].startswith(("memory:///in/", "000"))


@pytest.mark.slow
def test_paths_and_urls_may_be_mixed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gone is a row; storage that fails ends the run, so that it can be resumed."""
    memory = pytest.importorskip("fsspec", reason="the extra 'storage' is not installed").filesystem("memory")
    local = data.write_folder(tmp_path / "data")
    memory.pipe({f"/in/{name}": content for name, content in data.FILES.items()})
    job = PredictionJob([local, "memory://in/*.png"], model, str(tmp_path / "out.csv"), compute=CPU)
    read_one = type(memory).cat_file

    def fail(error: type[Exception]) -> None:
        def read_some(system: Any, path: str, *args: Any, **options: Any) -> bytes:
            if path == "/in/007.png":
                raise error("no token")
            return bytes(read_one(system, path, *args, **options))

        monkeypatch.setattr(type(memory), "cat_file", read_some)

    fail(PermissionError)
    with pytest.raises(BadInput, match="memory:///in/007.png cannot be read: access is denied \\(no token\\)"):
        job.run()
    fail(FileNotFoundError)
    assert job.run(resume=True).errors == 1
    memory.rm("/", recursive=True)
    labels = [row["label"] for row in read(tmp_path / "out.csv")]
    assert labels == [*data.LABELS, *data.LABELS[:7], "", *data.LABELS[8:]]


@pytest.mark.slow  # to import pyarrow takes a second
def test_formats_agree(model: Path, tmp_path: Path) -> None:
    """The two most probable classes as CSV, JSON lines and Parquet."""
    place = data.write_array(tmp_path)
    rows = predict(model, place, tmp_path / "out.csv", top_k=2)
    for suffix in ("jsonl", "parquet"):
        PredictionJob([place], model, str(tmp_path / f"out.{suffix}"), top_k=2, compute=CPU).run()
    objects = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra 'predict' is not installed")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert json.loads(table.schema.metadata[b"labels"]) == list(COLORS)
    assert table.schema.metadata[b"model"] == b"colors/1"
    for row, item, other in zip(rows, objects, table.to_pylist(), strict=True):
        assert [row["label"], row["label_2"]] == item["labels"] == other["labels"]
        flat = [float(row["probability"]), float(row["probability_2"])]
        assert flat == item["probabilities"] == pytest.approx(other["probabilities"], abs=1e-7)
        assert row["path"] == item["path"] == other["path"]
        assert item["error"] is other["error"] is None


def test_all_probabilities_are_in_the_order_of_the_labels(model: Path, tmp_path: Path) -> None:
    """A column each in CSV, a list otherwise."""
    place = data.write_array(tmp_path)
    rows = predict(model, place, tmp_path / "out.csv", all=True)
    PredictionJob([place], model, str(tmp_path / "out.jsonl"), all=True, compute=CPU).run()
    objects = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [[float(row[color]) for color in COLORS] for row in rows] == [item["probabilities"] for item in objects]
    assert [COLORS[int(np.argmax(item["probabilities"]))] for item in objects] == data.LABELS


@pytest.mark.parametrize("suffix", ["csv", "jsonl", SLOW_PARQUET])
def test_what_cannot_be_read_is_a_row_with_its_error(suffix: str, model: Path, tmp_path: Path) -> None:
    """Among others in its batch, and alone in its shard."""
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="the extra 'predict' is not installed")
    broken = {name: b"" if at in (1, 8, 9) else content for at, (name, content) in enumerate(data.FILES.items())}
    place = data.write_folder(tmp_path / "data", broken)
    to = tmp_path / f"out.{suffix}"
    for top_k, every in ((1, False), (2, False), (1, True)):
        done = PredictionJob([place], model, str(to), top_k, every, compute=CPU).run()
        assert (done.images, done.errors) == (10, 3)
        if suffix == "csv":
            rows = read(to)
            assert [row["label"] for row in rows] == ["" if at in (1, 8, 9) else x for at, x in enumerate(data.LABELS)]
            assert [row["error"] for row in rows if row["error"]] == ["is empty (0 bytes)"] * 3
        to.unlink()


def test_the_rest_of_a_damaged_archive_is_one_error(model: Path, tmp_path: Path) -> None:
    """The images before the damage are predicted."""
    place = Path(data.write_tar(tmp_path / "data"))
    place.write_bytes(place.read_bytes()[: 512 * 13 + 20])  # within the contents of an image
    rows = predict(model, str(place), tmp_path / "out.csv")
    assert [row["label"] for row in rows] == [*data.LABELS[: len(rows) - 1], ""]
    assert 1 < len(rows) < 10
    assert rows[-1]["path"] == str(place)
    assert "unexpected end of data" in rows[-1]["error"]


class Interruption(Exception):
    """Ends a run between two shards."""


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let a run end after so many shards."""

    def after(shards: int) -> None:
        add, numbers = Journal.add, itertools.count()

        def add_some(journal: Journal, *piece: Any) -> None:
            if next(numbers) == shards:
                raise Interruption
            add(journal, *piece)

        monkeypatch.setattr(Journal, "add", add_some)

    return after


@pytest.mark.parametrize("suffix", ["csv", SLOW_PARQUET])
@pytest.mark.parametrize("shards", [0, 1, 2])
def test_a_resumed_run_writes_the_same_bytes(
    shards: int, suffix: str, model: Path, tmp_path: Path, interrupt: Callable[[int], None]
) -> None:
    """As one that was not interrupted; a line that was torn is done again."""
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="the extra 'predict' is not installed")
    place, to = data.write_tar(tmp_path), tmp_path / f"out.{suffix}"
    job = PredictionJob([place], model, str(to), top_k=2, compute=CPU)
    job.run()
    whole = to.read_bytes()
    to.unlink()
    with pytest.MonkeyPatch.context():
        interrupt(shards)
        with pytest.raises(Interruption):
            job.run()
    assert not to.exists()
    with (tmp_path / f"out.{suffix}.parts" / "journal.jsonl").open("ab") as file:
        file.write(b'{"shard":2,"ima')
    interrupt(-1)
    done = job.run(resume=True)
    assert to.read_bytes() == whole
    assert (done.images, done.predicted) == (10, 10 - 4 * shards)


@pytest.fixture
def unfinished(model: Path, tmp_path: Path, interrupt: Callable[[int], None]) -> Iterator[PredictionJob]:
    """A run that ended after one shard."""
    job = PredictionJob([data.write_folder(tmp_path / "data")], model, str(tmp_path / "out.csv"), compute=CPU)
    interrupt(1)
    with pytest.raises(Interruption):
        job.run()
    return job


def test_an_unfinished_run_is_not_overwritten(unfinished: PredictionJob) -> None:
    """It is continued, or removed by hand."""
    with pytest.raises(BadInput, match="holds a run that did not end; continue it with --resume"):
        unfinished.run()


def test_a_piece_that_is_lost_is_computed_again(unfinished: PredictionJob) -> None:
    """As one that is cut; the journal says how long it was."""
    folder = Path(f"{unfinished.to}.parts")
    (folder / "0000000").write_bytes(b"")
    done = unfinished.run(resume=True)
    assert done.images == done.predicted == len(read(Path(unfinished.to)))


def test_a_run_of_which_only_the_output_is_missing_is_resumed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upload that failed, or where somebody wrote a file of the name meanwhile, which stays."""
    to = tmp_path / "out.csv"
    job = PredictionJob([data.write_array(tmp_path)], model, str(to), compute=CPU)
    merge = CsvFormat.merge

    def merge_late(self: CsvFormat, pieces: Iterable[Path], file: BinaryIO) -> None:
        to.write_text("precious")
        merge(self, pieces, file)

    with monkeypatch.context() as patch:
        patch.setattr(CsvFormat, "merge", merge_late)
        with pytest.raises(BadInput, match="exists; remove it, or name another file"):
            job.run()
    assert to.read_text() == "precious"
    to.unlink()
    done = job.run(resume=True)
    assert (done.predicted, done.images) == (0, len(read(to)))


def test_names_with_line_ends_are_one_row(model: Path, tmp_path: Path) -> None:
    """Of CSV, too."""
    (tmp_path / "in").mkdir()
    for name in ("a\rb.png", "c\nd.png", 'e"f.png'):
        (tmp_path / "in" / name).write_bytes(data.FILES["000.png"])
    to = tmp_path / "out.csv"
    PredictionJob([str(tmp_path / "in")], model, str(to), compute=CPU).run()
    with to.open(newline="") as file:
        assert [Path(row["path"]).name for row in csv.DictReader(file)] == ["a\rb.png", "c\nd.png", 'e"f.png']


def test_a_model_may_be_in_object_storage(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its latest version is fetched and checked."""
    memory = pytest.importorskip("fsspec", reason="the extra 'storage' is not installed").filesystem("memory")
    upload(model / "1", "memory://models")
    words = ["predict", data.write_array(tmp_path), "--device", "cpu", "--no-tune", "--to", str(tmp_path / "out.csv")]
    assert cli.main([*words, "--model", "memory://models/colors"]) == 0
    assert cli.main([*words, "--model", "memory://models/other"]) == 2
    assert "memory://models/other" in capsys.readouterr().err
    memory.rm("/", recursive=True)


def test_other_data_are_no_resumption(unfinished: PredictionJob, tmp_path: Path) -> None:
    """One file was changed."""
    (tmp_path / "data" / "b" / "009.png").write_bytes(data.FILES["000.png"] + b" ")
    with pytest.raises(BadInput, match="was begun with other data"):
        unfinished.run(resume=True)


def test_another_model_is_no_resumption(unfinished: PredictionJob, tmp_path: Path) -> None:
    """Nor another version of it, nor other answers."""
    version = write_version(tmp_path / "colors" / "2")
    with pytest.raises(BadInput, match="was begun with other model"):
        PredictionJob(unfinished.data, version, unfinished.to, compute=CPU).run(resume=True)
    with pytest.raises(BadInput, match="was begun with other answers"):
        PredictionJob(unfinished.data, unfinished.model, unfinished.to, top_k=2, compute=CPU).run(resume=True)


def test_a_full_disk_keeps_what_was_finished(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence."""
    fsync, numbers = os.fsync, itertools.count()

    def fill(descriptor: int) -> None:
        if next(numbers) == 3:  # after the first line, and the first shard with its line
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    job = PredictionJob([data.write_array(tmp_path)], model, str(tmp_path / "out.csv"), compute=CPU)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill)
        with pytest.raises(
            BadInput, match="No space left on device; free some, and run the same command with --resume"
        ):
            job.run()
    done = job.run(resume=True)
    assert (done.images, done.predicted) == (10, 6)


def test_only_one_process_writes_a_run(unfinished: PredictionJob) -> None:
    """The other is refused while the first one lives."""
    with (Path(f"{unfinished.to}.parts") / "journal.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="another process is writing"):
            unfinished.run(resume=True)


def write_numbers(folder: Path) -> str:
    """Write a table without images."""
    pa = pytest.importorskip("pyarrow", reason="the extra 'predict' is not installed")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"id": [1, 2]}), folder / "numbers.parquet")
    return "numbers.parquet"


def write_empty_folder(folder: Path) -> str:
    """Write a folder without images."""
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("")
    return "empty"


def write_other_shape(folder: Path) -> str:
    """Write pixels of another size."""
    np.save(folder / "other.npy", np.zeros((2, 8, 8, 3), np.uint8))
    return "other.npy"


def write_floats(folder: Path) -> str:
    """Write values that are no pixels."""
    np.save(folder / "floats.npy", np.zeros((2, 4, 4, 3), np.float32))
    return "floats.npy"


def write_no_table(folder: Path) -> str:
    """Write what is no table."""
    pytest.importorskip("pyarrow", reason="the extra 'predict' is not installed")
    (folder / "no.parquet").write_bytes(b"no table")
    return "no.parquet"


@pytest.mark.parametrize(
    ("place", "options", "sentence"),
    [
        pytest.param(
            write_numbers,
            [],
            "numbers.parquet has no column of image bytes; its columns are id (int64)",
            marks=pytest.mark.slow,
        ),
        pytest.param(write_no_table, [], "no.parquet is no Parquet file, or is damaged (", marks=pytest.mark.slow),
        (write_empty_folder, [], "empty holds no images; name files, folders or globs of"),
        (write_other_shape, [], "other.npy holds [2, 8, 8, 3], the model takes [images, 4, 4, 3]"),
        (write_floats, [], "floats.npy holds float32, not uint8 in rows; save pixels of 0 to 255"),
        (data.write_array, ["--to", "out.txt"], "--to out.txt: the ending must be one of .csv, .jsonl, .parquet"),
        (
            data.write_array,
            ["--to", "images.npy/out.csv"],
            "images.npy/out.csv.parts cannot be written (Not a directory)",
        ),
        (data.write_array, ["--model", "nowhere"], "nowhere does not exist; `resnet export RUN --to REPOSITORY/NAME`"),
        (data.write_array, ["--all", "--top-k", "2"], "--all writes the probabilities of all classes; leave out"),
        (data.write_array, ["--on", "spark"], "--on must be ray or ray=ADDRESS, not 'spark'"),
        (lambda _: "missing", [], "missing does not exist"),
        (
            lambda _: "x3://bucket/images",
            [],
            "x3://bucket/images cannot be opened: x3:// is no scheme",
        ),
        (
            lambda _: "gs://bucket/images",
            [],
            "gs://bucket/images cannot be opened: its driver is not",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    place: Callable[[Path], str],
    options: list[str],
    sentence: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With exit code 2, and nothing written."""
    monkeypatch.chdir(tmp_path)
    named = place(tmp_path)
    if "://" in named:
        pytest.importorskip("fsspec", reason="the extra 'storage' is not installed")
    before = sorted(tmp_path.iterdir())
    words = ["predict", named, "--model", str(model), "--to", "out.csv", "--device", "cpu", "--no-tune", *options]
    assert cli.main(words) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert printed[0].startswith(f"resnet predict: {sentence}")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("module", "words", "extra"),
    [
        ("fsspec", ["s3://bucket/images", "--to", "out.csv"], "storage"),
        ("pyarrow", ["images.npy", "--to", "out.parquet"], "predict"),
        ("pyarrow", ["images.parquet", "--to", "out.csv"], "predict"),
        ("ray", ["images.npy", "--to", "out.csv", "--on", "ray"], "ray"),
    ],
)
def test_a_missing_extra_is_named(
    module: str,
    words: list[str],
    extra: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one sentence."""
    monkeypatch.chdir(tmp_path)
    data.write_array(tmp_path)
    (tmp_path / "images.parquet").touch()
    before = sorted(tmp_path.iterdir())
    for name in ("tables", "cluster"):  # which a test before may have imported
        monkeypatch.delitem(sys.modules, f"serving.predict.{name}", raising=False)
        monkeypatch.delattr(serving.predict, name, raising=False)
    for name in (module, f"{module}.core", f"{module}.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["predict", *words, "--model", str(model), "--device", "cpu", "--no-tune"]) == 2
    assert f"pip install 'resnet[{extra}]'" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_version_and_a_label_name_a_model(model: Path, tmp_path: Path) -> None:
    """As the folder of the model does."""
    shutil.copytree(model, tmp_path / "colors")
    (tmp_path / "colors" / "stable").symlink_to("1")
    place = data.write_array(tmp_path)
    for name in ("1", "stable"):
        assert predict(tmp_path / "colors" / name, place, tmp_path / f"{name}.csv")


def test_prefetching_is_bounded_and_ends() -> None:
    """The thread is at most so many items ahead, passes errors on, and ends when nobody asks any more."""
    made, ended = [], threading.Event()

    def make() -> Iterator[int]:
        try:
            for number in range(100):
                made.append(number)
                yield number
            raise Interruption
        finally:
            ended.set()

    items = prefetch(make(), ahead=3)
    assert next(items) == 0
    assert len(made) <= 1 + 3 + 2
    items.close()
    assert ended.wait(10)
    with pytest.raises(Interruption):
        list(prefetch(make(), ahead=3))


@pytest.mark.slow
def test_clusters_that_cannot_be_used_are_named() -> None:
    """There is none, its nodes lack the package, or one says what is wrong itself."""
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    from serving.predict import cluster

    with pytest.raises(BadInput, match="--on ray=127.0.0.1:1: there is no cluster that can be used"):
        cluster.connect("127.0.0.1:1")
    missing = cluster._explain(RuntimeError("The actor died:\n  ModuleNotFoundError: No module named 'serving'\n"))
    assert isinstance(missing, BadInput)
    assert "a node cannot run this (ModuleNotFoundError: No module named 'serving'); install resnet" in str(missing)
    told = ray.exceptions.RayTaskError("predict", "Traceback", BadInput("x.tar does not exist")).as_instanceof_cause()
    assert str(cluster._explain(told)) == "x.tar does not exist"
