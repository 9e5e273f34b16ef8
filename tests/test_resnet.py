"""The command line, the packages, and what ships."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import resnet
from benchmarks.harness.process import ServerProcess
from resnet import cli
from serving.client import Client

ROOT = Path(__file__).parent.parent


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """`resnet --help` is exit code 0; `resnet` alone shows the same with exit code 2."""
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert cli.main(["fly"]) == 2
    assert "there is no command 'fly'; choose one of train" in capsys.readouterr().err


def test_help_of_a_command_loads_no_stage() -> None:
    """Seconds of TensorFlow are for work only."""
    code = """
import sys
from resnet import cli
for name in cli.COMMANDS:
    try:
        cli.main([name, "--help"])
    except SystemExit as end:
        assert end.code == 0
print([name for name in ("tensorflow", "keras", "onnxruntime") if name in sys.modules])
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "[]"


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A serving environment that is asked to train says what to install."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert cli.main(["train", "--out", "run"]) == 2
    assert "tensorflow is not installed; install resnet with its extra 'training'" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.PACKAGES)
def test_packages_are_those_of_this_repository(name: str) -> None:
    """Their names are common words: none may be shadowed by another distribution's."""
    file = importlib.import_module(name).__file__
    assert file is not None
    assert ROOT in Path(file).parents


def test_the_generated_code_fits_its_generator() -> None:
    """`make protos` was run with the pinned grpcio-tools: its version is written into the code."""
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if "grpcio-tools==" in line)
    assert (
        f"GRPC_GENERATED_VERSION = '{pinned.partition('==')[2]}'"
        in (ROOT / "protos/classifier_pb2_grpc.py").read_text()
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_holds_all_stages(wheel: Path) -> None:
    """Commands, packages, types, the .proto file and the dashboard; no tests, and nothing that only a clone can use."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    extras = {
        "protos/classifier.proto",
        "protos/classifier_pb2.pyi",
        "serving/observability/dashboard.json",
        "serving/py.typed",
    }
    assert {"resnet/cli.py", *extras} < names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(cli.PACKAGES)
    assert not [name for name in names if name.startswith(("benchmarks/peers", "benchmarks/studies"))]


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_environment(wheel: Path, repository: Path, address: str, tmp_path: Path) -> None:
    """With no extra it is the client, with `serving` it serves and classifies; what else it could do it says."""
    uv, python, image = Path(sys.executable).with_name("uv"), tmp_path / "bin" / "python", tmp_path / "image.png"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path], check=True)
    Image.new("RGB", (40, 30)).save(image)

    def install(extra: str) -> None:
        pins = ["--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *pins, f"{wheel}{extra}"], check=True)

    def resnet(*words: str) -> subprocess.CompletedProcess[str]:
        command = [python, "-m", "resnet", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    install("")
    code = "from resnet import AsyncClient, Client, Overloaded; import sys; print('onnxruntime' in sys.modules)"
    shown = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert shown == "False\n"
    assert resnet("classify", str(image), "--server", address).returncode == 0
    assert resnet("status", address).returncode == 0
    refused = resnet("demo")
    assert (refused.returncode, "with its extra 'all'" in refused.stderr) == (2, True)
    install("[serving]")
    with ServerProcess([str(python), "-m", "resnet", "serve", str(repository), "--port=0", "--no-tune"]) as server:
        assert resnet("classify", str(image), "--server", server.address).returncode == 0


def test_the_public_face_names_what_there_is() -> None:
    """`from resnet import Client` and all else in `__all__`, the same as where it is made."""
    assert all(getattr(resnet, name).__name__ == name for name in resnet.__all__)
    assert resnet.Client is Client
    with pytest.raises(AttributeError, match="no attribute 'Servant'"):
        _ = resnet.Servant


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 3}, "there is no option 'epoch'; do you mean 'epochs'?"),
        ({"epochs": "many"}, "--epochs must be a whole number, not 'many'"),
        ({"epochs": 0}, "--epochs must be from 1 to 1000000, not 0"),
        ({"model": "resnet19"}, "--model 'resnet19' is unknown"),
        ({"data": "nothing"}, "--data 'nothing' is unknown"),
    ],
)
def test_bad_options_of_a_function_are_one_sentence(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """That of the command, which says what to do."""
    with pytest.raises(resnet.BadInput, match=re.escape(message)):
        resnet.train(out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_the_stages_are_functions_too(tiny: str, tmp_path: Path) -> None:
    """Their keywords are the options of the commands: text, numbers and lists, and paths of either kind."""
    run = resnet.train(out=tmp_path / "run", model=tiny, epochs=1, images=64, recipe="notebook")
    settings = json.loads((run.folder / "settings.json").read_text())
    assert (settings["data"], settings["model"], settings["images"], settings["epochs"]) == ("digits", tiny, 64, 1)
    assert run.read_metrics()["images"]["test"] == 360
    version = resnet.export(run.folder, to=str(tmp_path / "models" / "digits"), precision=["fp32"])
    assert version == tmp_path / "models" / "digits" / "1"
    assert (Path(version) / "model.onnx").exists()
