"""The small network is in the family for every test here, whether it asks for it or not."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest


@pytest.fixture(autouse=True)
def small_network(tiny: str) -> str:
    """Return its name."""
    return tiny


@pytest.fixture(scope="session")
def reduced(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a version with variants in fp16 and int8; tests change copies only."""
    from export import source
    from export.export import export
    from tests.export.sources import POINT

    budgets = POINT | {"int8": msgspec.structs.replace(POINT["int8"], accuracy_drop=0.05)}
    return export(source.load(run), tmp_path_factory.mktemp("reduced") / "digits", ["fp16", "int8"], budgets)
