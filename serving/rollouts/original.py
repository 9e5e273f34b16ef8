"""Placeholder until the process of the Keras original is merged."""

from __future__ import annotations

from pathlib import Path

from serving.runtimes.base import Images, Probabilities


class OriginalProcess:
    chunk = 8

    def __init__(self, folder: Path) -> None: ...
    def compute(self, images: Images) -> Probabilities | None: ...
    def close(self) -> None: ...
