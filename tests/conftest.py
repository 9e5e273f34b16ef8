"""A small model, trained, exported and served once for all tests; each test changes copies only."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from export.manifest import Manifest
from training.commands.train import start_tensorflow

os.environ["TF_XLA_FLAGS"] = ""  # the small networks of tests compile for longer than they train
start_tensorflow()

from training.model import ARCHITECTURES, Architecture  # noqa: E402  # TensorFlow comes first

TINY = Architecture((8, 16), strides=(1, 2), blocks=(1, 1))

# What a user's shell would start, with the tests' small network in the family.
TRAIN = """
import sys
from resnet import cli
from tests.conftest import TINY
from training.model import ARCHITECTURES
ARCHITECTURES["tiny"] = TINY
sys.exit(cli.main(sys.argv[1:]))
"""


def edit_manifest(version: Path, change: Callable[[dict[str, Any]], object], forge: bool = True) -> None:
    """Change the manifest of a version; `forge` also puts the digest right, if it is still a manifest."""
    path = version / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    if forge:
        with contextlib.suppress(msgspec.ValidationError):
            content["digest"] = msgspec.convert(content, Manifest).compute_digest()
    path.write_text(json.dumps(content))


@pytest.fixture(scope="session", autouse=True)
def tiny() -> Iterator[str]:
    """Add a network to the family that trains in seconds, and return its name."""
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
    from training.recipes import RECIPES
    from training.train import TrainingSettings, train

    recipe = dataclasses.replace(RECIPES["notebook"], epochs=3)
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train(TrainingSettings(data="digits", model=tiny, recipe=recipe), folder)
    return folder


@pytest.fixture(scope="session")
def repository(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository that holds digits/1."""
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
    from export.convert import load_keras

    return load_keras(repository / "digits" / "1" / "model.keras")(heldout[0])


@pytest.fixture(scope="session", params=["grpcio", "native"])
def transport(request: pytest.FixtureRequest) -> str:
    """What receives the calls of a server: whatever is asked of one, both must answer."""
    return str(request.param)


@pytest.fixture(scope="session")
def address(repository: Path, transport: str) -> Iterator[str]:
    """A server of the model repository, on a free port."""
    from serving.config import Limits
    from serving.models import loader, registry
    from serving.server import Server

    model = loader.load(repository / "digits" / "1", "cpu")
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
