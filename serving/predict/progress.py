"""Progress of a prediction on stderr: a bar on a terminal, if rich is installed, and a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_SECONDS = 10.0


class PredictionProgress:
    """Shows how many images were predicted, how fast, and how long the rest takes.

    Attributes:
        images: Images that this run has predicted.
    """

    def __init__(self, total: int | None, shards: int) -> None:
        """Show the progress to `total` images; if that is not known, to `shards` shards."""
        self.images = 0
        self._total, self._shards, self._finished = total, shards, 0
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._started = self._shown = time.perf_counter()
        if sys.stderr.isatty():
            with suppress(ModuleNotFoundError):
                from rich.console import Console
                from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

                columns = BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn(), TextColumn("left")
                self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
                self._task = self._bar.add_task("", total=1.0)
                self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since it started."""
        return time.perf_counter() - self._started

    def add(self, images: int) -> None:
        """Count images."""
        self.images += images
        self._show()

    def finish_shard(self) -> None:
        """Count a shard."""
        self._finished += 1

    def _show(self) -> None:
        of = f" of {self._total:,}" if self._total is not None else ""
        text = f"{self.images:,}{of} images, {self.images / self.seconds:,.0f} images/s"
        share = self.images / self._total if self._total else self._finished / self._shards
        if self._bar is not None:
            self._bar.update(self._task, description=text, completed=share)
        elif time.perf_counter() - self._shown > LINE_SECONDS:
            self._shown = time.perf_counter()
            left = f", {timedelta(seconds=round(self.seconds * (1 - share) / share))} left" if share else ""
            print(f"{text}{left}", file=sys.stderr, flush=True)
