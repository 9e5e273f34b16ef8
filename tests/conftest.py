"""A small model, trained, exported and served once for all tests; each test changes copies only.

TensorFlow takes seconds to load, and is loaded only for the tests that ask for it; `pytest --quick` leaves these out.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from export.manifest import Manifest
from resnet import cli

cli.set_variables()
os.environ["TF_XLA_FLAGS"] = ""  # the small networks of tests compile for longer than they train

ROOT = Path(__file__).parent.parent
MODELS = os.environ.get("TESTS_MODELS")  # temporary folder of an earlier session, for `tests.mutants`
TENSORFLOW = {"keras", "tensorflow", "tensorflow_serving", "tf2onnx"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --quick."""
    parser.addoption("--quick", action="store_true", help="leave out what needs TensorFlow, and what is slow")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out a file that loads TensorFlow, with --quick."""
    quick = config.getoption("--quick") and collection_path.suffix == ".py"
    return True if quick and loads_tensorflow(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of the trained model, and slow ones, with --quick."""
    if config.getoption("--quick"):
        slow = [item for item in items if uses_model(item) or item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def uses_model(item: pytest.Item) -> bool:
    """Return whether a test asks for the trained model, or for what follows from it."""
    return "tiny" in getattr(item, "fixturenames", ())


@functools.cache
def loads_tensorflow(path: Path) -> bool:
    """Return whether importing a module of this repository loads TensorFlow."""
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.partition(".")[0] in TENSORFLOW:
                return True
            place = ROOT / name.replace(".", "/")
            files = (place.with_suffix(".py"), place / "__init__.py")
            if any(loads_tensorflow(file) for file in files if file.is_file() and file != path):
                return True
    return False


def edit_manifest(version: Path, change: Callable[[dict[str, Any]], object], forge: bool = True) -> None:
    """Change the manifest of a version; `forge` also puts the digest right, if it is still a manifest."""
    path = version / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    if forge:
        with contextlib.suppress(msgspec.ValidationError):
            content["digest"] = msgspec.convert(content, Manifest, strict=False).compute_digest()
    path.write_text(json.dumps(content))


@pytest.fixture(scope="session")
def tiny() -> Iterator[str]:
    """Add a network to the family that trains in seconds, and return its name."""
    from tests.tiny import TINY
    from training.model import ARCHITECTURES

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "tiny", TINY)
        yield "tiny"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Have what is measured kept in a folder of its own, not in that of whoever runs the tests; return the folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """A finished run folder."""
    if MODELS:
        return Path(MODELS) / "runs0" / "digits"
    from training.recipes import RECIPES
    from training.train import TrainingSettings, train

    recipe = dataclasses.replace(RECIPES["notebook"], epochs=3, calibrate=True)
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train(TrainingSettings(data="digits", model=tiny, recipe=recipe), folder)
    return folder


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures of a run, which take longer than a training here."""
    if "training.train" in sys.modules:
        for name in ("plot_confusion", "plot_mistakes", "plot_reliability"):
            monkeypatch.setattr(f"training.train.{name}", lambda *_: None)
        monkeypatch.setattr("training.checkpoints.plot_curves", lambda *_: None)


@pytest.fixture(scope="session")
def repository(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository that holds digits/1."""
    if MODELS:
        return Path(MODELS) / "models0"
    from export import source
    from export.export import export

    folder = tmp_path_factory.mktemp("models")
    export(source.load(run), folder / "digits")
    return folder


@pytest.fixture
def own_repository(repository: Path, tmp_path: Path) -> Path:
    """A copy of the model repository, for a test that changes it."""
    return Path(shutil.copytree(repository, tmp_path / "models"))


@pytest.fixture(scope="session")
def heldout(run: Path) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """The test images of the digits and their classes."""
    from export.source import load_heldout

    return load_heldout(run)


@pytest.fixture(scope="session")
def probabilities(repository: Path, heldout: tuple[NDArray[np.uint8], NDArray[np.int32]]) -> NDArray[np.float32]:
    """What the Keras original answers to the test images."""
    from export import original

    return original.load(repository / "digits" / "1" / "model.keras")(heldout[0])


@pytest.fixture(scope="session", params=["grpcio", "native"])
def transport(request: pytest.FixtureRequest) -> str:
    """What receives the calls of a server: whatever is asked of one, both must answer."""
    return str(request.param)


@pytest.fixture(scope="session")
def address(repository: Path, transport: str) -> Iterator[str]:
    """A server of the model repository, on a free port."""
    from serving.config import Compute, Limits
    from serving.models import loader, registry
    from serving.server import Server

    model = loader.load(repository / "digits" / "1", Compute(device="cpu", tune=False))
    with Server(registry.ModelRegistry([model]), "127.0.0.1", 0, Limits(), transport=transport) as server:
        yield server.address


@pytest.fixture(scope="session")
def png() -> Callable[[NDArray[np.uint8]], bytes]:
    """Encodes pixels without loss."""

    def encode(pixels: NDArray[np.uint8]) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    return encode
