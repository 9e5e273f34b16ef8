"""A repository is read by several servers and tended by hand: whole versions only, and nothing left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from export import manifest, repository, triton
from resnet import BadInput, cli

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
    assert capsys.readouterr().out == f"removed {tmp_path / 'digits' / '1'}\n"
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == ["10", "2"]
    assert cli.main(["models", "prune", str(tmp_path), "--keep", "0"]) == 2


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
