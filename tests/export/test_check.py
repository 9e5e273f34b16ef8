"""check.py of a version, in an environment with numpy and onnxruntime only: it runs without any of our code."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.conftest import ROOT, edit_manifest
from tests.versions import Content

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python with numpy and onnxruntime, and what these need."""
    folder, uv = tmp_path_factory.mktemp("environment"), Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    found = folder / "bin" / "python"
    install = [uv, "pip", "install", "--quiet", "--python", found, "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*install, "numpy", "onnxruntime"], check=True)
    return found


@pytest.fixture
def version(reduced: Path, tmp_path: Path) -> Path:
    """A copy of a version with fp32, fp16 and int8."""
    return Path(shutil.copytree(reduced, tmp_path / "digits" / "1"))


def check(python: Path, version: Path) -> tuple[int, str]:
    """Return exit code and output."""
    command = [python, "-I", version / "check.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=version.parent)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def list_hashes(version: Path) -> None:
    """Put the hashes and the digest of the manifest right, as a forger can."""
    files = json.loads((version / "manifest.json").read_text())["files"]
    found = {name: hashlib.sha256((version / name).read_bytes()).hexdigest() for name in files}
    edit_manifest(version, lambda content: content.update(files=found))


def change_reference(**changes: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Return a change of arrays of reference.npz, with forged hashes."""

    def plant(version: Path) -> None:
        with np.load(version / "reference.npz") as file:
            arrays: Content = dict(file)
        for name, change in changes.items():
            arrays[name] = change(arrays[name])
        np.savez_compressed(version / "reference.npz", **arrays)
        list_hashes(version)

    return plant


def break_graph(version: Path) -> None:
    """Exchange two classes in the answers of int8, with forged hashes."""
    model = onnx.load(version / "model.int8.onnx")
    (last,) = (node for node in model.graph.node if node.output[0] == "probabilities")
    last.output[0] = "right"
    order = np.array([1, 0, *range(2, 10)])
    model.graph.initializer.append(onnx.numpy_helper.from_array(order, "order"))
    model.graph.node.append(onnx.helper.make_node("Gather", ["right", "order"], ["probabilities"], axis=1))
    onnx.save(model, version / "model.int8.onnx")
    list_hashes(version)


def edit(change: Callable[[Content], object]) -> Callable[[Path], None]:
    """Return a change of the certificate, with a forged digest."""
    return lambda version: edit_manifest(version, lambda content: change(content["certificate"]))


def append(name: str) -> Callable[[Path], None]:
    """Return a change of a file."""

    def plant(version: Path) -> None:
        (version / name).write_bytes((version / name).read_bytes() + b"x")

    return plant


def link(version: Path) -> None:
    """Put a link to the same content in the place of a file."""
    (version / "labels.txt").rename(version.parent / "labels.txt")
    (version / "labels.txt").symlink_to("../labels.txt")


def claim_bound(certificate: Content) -> None:
    """Claim what the images cannot show."""
    certificate["variants"][2]["budget"].update(evidence="bound")


def of_another_model(certificate: Content) -> None:
    """Make the certificate one of a model that is wrong on ten images more."""
    certificate["accuracy"] -= 10 / certificate["images"]


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed file": (append("labels.txt"), "FAILED: labels.txt was changed"),
    "a changed graph": (append("model.onnx"), "FAILED: model.onnx was changed"),
    "an added file": (lambda version: (version / "assets" / "x").touch(), "FAILED: assets/x was added"),
    "a hidden file": (lambda version: (version / ".hidden").touch(), "FAILED: .hidden was added"),
    "an added link": (lambda version: (version / "x").symlink_to("/etc"), "FAILED: x was added"),
    "a link": (link, "FAILED: labels.txt is missing, or a link"),
    "a removed file": (lambda version: (version / "model.keras").unlink(), "FAILED: model.keras is missing, or a link"),
    "no manifest": (lambda version: (version / "manifest.json").unlink(), "FAILED: FileNotFoundError: "),
    "a broken manifest": (lambda version: (version / "manifest.json").write_text("{"), "FAILED: JSONDecodeError: "),
    "swapped answers": (
        change_reference(probabilities=lambda answers: answers[::-1]),
        "FAILED: the certificate is about a model that is right on ",
    ),
    "surer answers": (
        change_reference(probabilities=np.square),
        "model.onnx, batch size 1: difference .* OUTSIDE ITS BUDGET",
    ),
    "other images": (
        change_reference(images=lambda images: 255 - images),
        "FAILED: the certificate is about other images",
    ),
    "a certificate of another model": (
        edit(of_another_model),
        "FAILED: the certificate is about a model that is right",
    ),
    "a budget that the evidence cannot carry": (
        edit(claim_bound),
        "model.fp16.onnx, batch size 64: difference .*, 0 lost, 0 gained: OUTSIDE ITS BUDGET",
    ),
    "no budget": (
        edit(lambda certificate: certificate["variants"][0]["budget"].update(max_difference=None)),
        "FAILED: model.onnx has no comparison, or no budget",
    ),
    "no comparison": (
        edit(lambda certificate: certificate["variants"][3].update(rows=[])),
        "FAILED: model.int8.onnx has no comparison, or no budget",
    ),
    "no certificate": (edit(lambda certificate: certificate["variants"].pop()), "FAILED: ValueError: "),
    "a worse graph": (break_graph, "model.int8.onnx, batch size 3: difference .* lost, . gained: OUTSIDE ITS BUDGET"),
    "another accuracy": (
        edit(lambda certificate: certificate["variants"][3]["rows"][1].update(accuracy=0.1)),
        "model.int8.onnx, batch size 3: difference .* gained: NOT AS CERTIFIED",
    ),
}


def test_a_good_version_holds(python: Path, version: Path) -> None:
    """Exit code 0, and a line for each ONNX file and batch size."""
    code, output = check(python, version)
    lines = output.splitlines()
    assert code == 0
    assert lines[0].endswith("of 360 held-out images")
    assert [line.partition(": ")[0] for line in lines[1:-1]] == [
        f"{name}, batch size {size}"
        for name in ("model.fp16.onnx", "model.int8.onnx", "model.onnx")
        for size in (1, 3, 64)
    ]
    assert all(line.endswith(": holds") for line in lines[1:-1])
    assert lines[-1] == "digits/1 holds"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str, python: Path, version: Path) -> None:
    """In one line, with exit code 1 and without a traceback."""
    plant, message = FAULTS[fault]
    plant(version)
    code, output = check(python, version)
    assert code == 1
    assert [line for line in output.splitlines() if re.match(message, line)], output


def test_any_folder_is_checked(python: Path, version: Path, tmp_path: Path) -> None:
    """By a copy of the script that one trusts; one that is not there is one line."""
    script = tmp_path / "trusted.py"
    shutil.copy(version / "check.py", script)
    for folder, code, end in ((version, 0, "digits/1 holds\n"), (tmp_path / "nowhere", 1, "manifest.json'\n")):
        done = subprocess.run([python, script, folder], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.endswith(end), done.stderr) == (code, True, "")


def test_the_script_is_read_in_a_minute() -> None:
    """Whoever runs it can read it before: it is short, and imports nothing but numpy and onnxruntime."""
    text = (ROOT / "export" / "check.py").read_text()
    assert len(text.splitlines()) <= 60
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)) == {
        *("hashlib", "json", "sys", "pathlib", "numpy", "onnxruntime")
    }
