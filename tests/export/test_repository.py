"""A repository is read by several servers and tended by hand: whole versions only, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from export import manifest, repository, triton
from resnet import BadInput, cli
from tests.versions import write_version

STAGE = """
import sys
from pathlib import Path
from export import repository
with repository.staging(Path(sys.argv[1])) as folder:
    (folder / "model.onnx").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_triton_understands_its_configuration(own_repository: Path) -> None:
    """Parsed by the message that Triton itself parses it with; names, types, shapes and labels are the manifest's."""
    folder = own_repository / "digits"
    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    version = manifest.read(folder / "1")
    assert config.name == "digits"
    assert config.backend == "onnxruntime"
    assert (folder / "1" / config.default_model_filename).is_file()
    assert config.max_batch_size == 64
    assert config.HasField("dynamic_batching")
    (image,), (probabilities,) = config.input, config.output
    assert (image.name, image.data_type, list(image.dims)) == ("image", model_config_pb2.TYPE_UINT8, [32, 32, 3])
    assert (probabilities.name, probabilities.data_type, list(probabilities.dims)) == (
        "probabilities",
        model_config_pb2.TYPE_FP32,
        [10],
    )
    assert (folder / probabilities.label_filename).read_text().splitlines() == version.labels


def test_a_version_with_other_classes_cannot_join(own_repository: Path) -> None:
    """Triton has one configuration for all versions, and clients count on it."""
    model = own_repository / "digits"
    version = manifest.read(model / "1")
    triton.write_files(version, model)
    (model / "labels.txt").write_text("cat\ndog\n")
    with pytest.raises(BadInput, match="labels.txt describes a model with another input or other classes"):
        triton.write_files(version, model)


def test_what_is_in_the_way_of_a_version_is_passed(tmp_path: Path) -> None:
    """A file or a link with the name of a number is no version, and no reason to wait."""
    model = tmp_path / "digits"
    model.mkdir()
    (model / "1").touch()
    (model / "2").symlink_to("nowhere")
    with repository.staging(model) as staged:
        assert repository.publish(staged, lambda _: None) == model / "3"
    assert repository.versions(model) == [3]


def test_a_version_without_a_further_number_is_the_last(tmp_path: Path) -> None:
    """Numbers have 64 bits in the protocols."""
    model = tmp_path / "digits"
    (model / ("9" * 18)).mkdir(parents=True)
    reason = "9{18} has the highest number that a version can have; rename it"
    with pytest.raises(BadInput, match=reason), repository.staging(model) as staged:
        repository.publish(staged, lambda _: None)
    assert repository.versions(model) == [int("9" * 18)]


def test_files_of_an_export_that_was_never_published_bind_nobody(tmp_path: Path) -> None:
    """One that ended before its first version appeared; the next one may have other classes."""
    version = manifest.read(write_version(tmp_path / "elsewhere" / "colors" / "1"))
    model = tmp_path / "colors"
    model.mkdir()
    (model / "labels.txt").write_text("cat\ndog\n")
    triton.write_files(version, model)
    assert (model / "labels.txt").read_text().split() == version.labels


@pytest.mark.parametrize(
    "name", ["config.pbtxt", "labels.txt", "README.md", "notes", "elsewhere", "7", "a/b", ".x", ""]
)
def test_a_label_replaces_no_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Triton's files, others, folders and links that are no labels stay what they are, there or not."""
    model = write_version(tmp_path / "colors" / "1").parent
    (model / "README.md").write_text("read me")
    (model / "notes").mkdir()
    (model / "elsewhere").symlink_to("/tmp")
    before = sorted(path.name for path in model.iterdir())
    assert cli.main(["models", "label", str(model), name, "1"]) == 2
    assert f"the label {name!r} is invalid" in capsys.readouterr().err
    assert sorted(path.name for path in model.iterdir()) == before
    assert (model / "README.md").read_text() == "read me"
    assert cli.main(["models", "label", str(model), name]) == 2


def test_a_label_is_a_link_to_a_version_of_its_model(tmp_path: Path) -> None:
    """However it is written; one whose version is gone names nothing, and can be moved and removed."""
    model = write_version(tmp_path / "colors" / "1").parent
    other = write_version(tmp_path / "other" / "1")
    for name, target in (("a", "1"), ("b", "./1/"), ("c", str(model / "1")), ("d", str(other)), ("e", "9"), ("f", "f")):
        (model / name).symlink_to(target)
    assert repository.labels(model) == {"a": 1, "b": 1, "c": 1}
    repository.label(model, "e", 1)
    assert repository.labels(model)["e"] == 1
    for name in ("a", "e"):
        repository.unlabel(model, name)
    assert repository.labels(model) == {"b": 1, "c": 1}


def test_list_and_show_tell_what_there_is(own_repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A version that cannot be read has its line too, with the reason."""
    (own_repository / "digits" / "2").mkdir()
    assert cli.main(["models", "list", str(own_repository)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["digits/1", "32x32x3", "10"]
    assert "manifest.json cannot be read" in lines[2]
    assert cli.main(["models", "show", str(own_repository / "digits"), "--version", "1"]) == 0
    shown = capsys.readouterr().out
    assert "image: uint8 [-1, 32, 32, 3]" in shown
    assert "onnx         fp32, allowed a difference of 1e-05" in shown
    assert cli.main(["models", "show", str(own_repository), "--version", "7"]) == 2
    assert "has no version 7; it has [1, 2]" in capsys.readouterr().err


def test_the_schema_is_that_of_a_manifest(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It names every field that a manifest has."""
    assert cli.main(["models", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    content = json.loads((repository / "digits" / "1" / "manifest.json").read_text())
    assert content.keys() == schema["$defs"]["Manifest"]["properties"].keys()


def test_prune_keeps_the_latest_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And says what it removed."""
    for number in (1, 2, 10):
        (tmp_path / "digits" / str(number)).mkdir(parents=True)
    assert cli.main(["models", "prune", str(tmp_path), "--keep", "2"]) == 0
    assert capsys.readouterr().out == "removed digits/1\n"
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == ["10", "2"]
    assert cli.main(["models", "prune", str(tmp_path), "--keep", "0"]) == 2


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_version_has_the_permissions_that_the_user_gives(umask: int, tmp_path: Path) -> None:
    """Its folder too, so that who may read the files can reach them."""
    before = os.umask(umask)
    try:
        with repository.staging(tmp_path / "digits") as staged:
            version = repository.publish(staged, lambda _: None)
    finally:
        os.umask(before)
    assert stat.S_IMODE(version.stat().st_mode) == 0o777 & ~umask


def test_an_export_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """And spares one under way beside it."""
    model = tmp_path / "digits"
    with repository.staging(model) as first:
        left = model / f"{repository.STAGING}left"
        left.mkdir()
        (left / "model.onnx").touch()
        with repository.staging(model) as second:
            assert sorted(model.iterdir()) == sorted([first, second])
    assert not list(model.iterdir())


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """As on a full disk."""

    def fail() -> None:
        with repository.staging(tmp_path / "digits") as staged:
            (staged / "model.onnx").touch()
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fail()
    assert not list((tmp_path / "digits").iterdir())


def test_a_file_system_without_locks_of_folders_takes_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS: an export works, and what others may be writing is left alone."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(repository.fcntl, "flock", refuse)
    (tmp_path / "digits" / f"{repository.STAGING}other").mkdir(parents=True)
    with repository.staging(tmp_path / "digits") as staged:
        repository.publish(staged, lambda _: None)
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == [f"{repository.STAGING}other", "1"]


def make_foreign(folder: Path) -> None:
    """A repository, and beside it what people take for a part of one."""
    write_version(folder / "models" / "colors" / "1")
    for name, file in (("tf", "saved_model.pb"), ("run", "model.keras"), ("empty", "x")):
        (folder / name).mkdir()
        (folder / name / file).touch()


@pytest.mark.parametrize("command", [["verify"], ["models", "show"], ["models", "list"]])
@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", "nowhere does not exist; `resnet export RUN --to REPOSITORY/NAME` makes a model"),
        ("models/colors/1", "1 is a version; name its model, models/colors, or repository, models"),
        ("models/colors/1/model.onnx", "model.onnx is a file; name the folder"),
        ("tf", "tf is a SavedModel that `resnet export` did not make; export its Keras original"),
        ("run", "run is a run folder; `resnet export run --to REPOSITORY/NAME`"),
        ("empty", "empty holds no models; `resnet export RUN --to REPOSITORY/NAME` makes one"),
    ],
)
def test_what_is_no_model_is_named(
    command: list[str],
    folder: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the way out."""
    make_foreign(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command, folder]) == 2
    assert message in capsys.readouterr().err


def test_a_repository_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Verify names those that it holds."""
    write_version(tmp_path / "colors" / "1")
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert f"{tmp_path} is a repository; name one of its models: colors" in capsys.readouterr().err


def test_prune_removes_what_a_killed_export_left_and_spares_one_under_way(tmp_path: Path) -> None:
    """A staging folder is locked by its process."""
    model = tmp_path / "digits"
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    staged = Path(process.stdout.readline().strip())
    assert list(repository.prune(model, keep=1)) == []
    assert (staged / "model.onnx").read_text() == "half"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert repository.versions(model) == []
    assert list(repository.prune(model, keep=1)) == [staged]
    assert not list(model.iterdir())


def test_a_model_is_opened_as_a_repository(tmp_path: Path) -> None:
    """Of that model alone, under the name that its versions have; what is none is opened as it is."""
    models = tmp_path / "models"
    write_version(models / "colors" / "1")
    (models / "others").mkdir()
    mounted = (models / "colors").rename(tmp_path / "mounted")
    (mounted / "2").mkdir()  # is being copied
    with repository.opened(mounted) as folder:
        assert [path.name for path in repository.folders(folder)] == ["colors"]
        assert manifest.read(folder / "colors" / "1").model == "colors"
        (mounted / "stable").symlink_to("1")
        assert repository.labels(folder / "colors") == {"stable": 1}
    assert not folder.exists()
    assert repository.versions(mounted) == [1, 2]
    for name in ("models", "nowhere"):
        with repository.opened(tmp_path / name) as folder:
            assert folder == tmp_path / name


@pytest.mark.parametrize("content", [None, "no JSON", "{}", '{"model": "../../up"}'])
def test_a_model_without_a_name_is_not_opened(content: str | None, tmp_path: Path) -> None:
    """A name may not lead elsewhere."""
    (tmp_path / "1").mkdir()
    if content is not None:
        (tmp_path / "1" / "manifest.json").write_text(content)
    with pytest.raises(BadInput, match="holds no version that `resnet export` made"), repository.opened(tmp_path):
        pass
