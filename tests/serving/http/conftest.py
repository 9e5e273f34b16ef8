"""A server that all tests of HTTP share which change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.http.site import HttpSite, serve


@pytest.fixture(scope="session")
def site(repository: Path) -> Iterator[HttpSite]:
    """The digits over HTTP."""
    with serve(repository) as running:
        yield running
