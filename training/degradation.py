"""The experiment of `resnet degradation`: plain and residual networks at two depths, trained in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from resnet import BadInput
from training.model import ARCHITECTURES
from training.plots import plot_errors
from training.run_folder import HistoryRow, RunFolder
from training.train import TrainingSettings, train


class ErrorRates(NamedTuple):
    """The errors of one network after its last epoch, as shares of 0 to 1."""

    training: float
    test: float


def list_networks(depths: Sequence[int]) -> list[str]:
    """Return the names of the plain and the residual network of each depth.

    Raises:
        BadInput: The depths do not increase, or there is no network of a depth.
    """
    shallow, deep = depths
    if shallow >= deep:
        raise BadInput(f"--depths must name the smaller depth first, not {shallow} {deep}")
    names = [f"{kind}{depth}" for kind in ("plain", "resnet") for depth in depths]
    for name in names:
        if name not in ARCHITECTURES:
            raise BadInput(f"there is no network {name!r}; `resnet family` lists the depths for --depths")
    return names


def train_networks(settings: Sequence[TrainingSettings], folder: Path, resume: bool = False) -> dict[str, ErrorRates]:
    """Train each network into a run folder of its own, and draw their errors by epoch.

    Args:
        settings: One for each network.
        folder: The folder for the run folders and degradation.png.
        resume: Continue where an interrupted call stopped.

    Returns:
        The errors by network.
    """
    histories: dict[str, list[HistoryRow]] = {}
    errors = {}
    for number, network in enumerate(settings, start=1):
        name = network.model
        print(f"\n=== {number} of {len(settings)}: {name}\n", flush=True)
        accuracy = train(network, folder / name, resume)["accuracy"]
        histories[name] = RunFolder(folder / name).read_history()
        errors[name] = ErrorRates(training=1 - histories[name][-1]["accuracy"], test=1 - accuracy)
    plot_errors(histories, RunFolder(folder))
    return errors
