"""Training from Python: `resnet.train`, whose keywords are the options of the command."""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from resnet import BadInput
from resnet.options import check, option, sort_keywords
from training.backend import start_tensorflow
from training.data import SOURCES
from training.distribute import STRATEGIES
from training.heads import HEADS
from training.images import CHANNELS, parse_size
from training.preprocessing import PREPROCESSING
from training.recipes import FINETUNE, QUANTIZE, RECIPES, Recipe
from training.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of `resnet train`, except those of the recipe."""

    data: str = option("digits", f"data set: {SOURCES}", metavar="DATA")
    model: str | None = option(
        None,
        "network: one of `resnet family` or keras.applications (default: resnet18, or that of --from)",
        metavar="NAME",
    )
    from_: str | None = option(
        None,
        "start from what another network has learned: a run folder, a .keras or .h5 file, or imagenet",
        metavar="RUN|FILE|imagenet",
    )
    preprocess: str | None = option(
        None,
        "with --from FILE: preprocessing that a model with float input expects, as for `resnet export`",
        choices=tuple(PREPROCESSING),
        metavar="KIND",
    )
    recipe: str | None = option(
        None,
        "hyperparameters to start from (default: notebook; finetune with --from, quantize with --quantize)",
        choices=tuple(RECIPES),
    )
    seed: int = option(0, "random seed of initial weights and image order", low=0, high=2**32 - 1)
    image_size: str | None = option(None, "resize image files to N by N, or height by width pixels", metavar="N|HxW")
    colors: str | None = option(
        None, "colours of the images that the model takes (default: those of the data)", choices=tuple(CHANNELS)
    )
    head: str | None = option(
        None,
        "an output for each class (softmax), or one for the second of two (default: softmax, or that of --from)",
        choices=HEADS,
    )
    images: int | None = option(None, "number of training images to use (default: all)", low=1)
    out: Path = option(MISSING, "run folder to write", metavar="FOLDER", required=True)
    resume: bool = option(False, "continue the run in --out after its last finished epoch")
    tensorboard: bool = option(False, "also write the curves for TensorBoard")
    distribute: str | None = option(
        None, "train on all GPUs (mirrored) or on the machines in TF_CONFIG (multiworker)", choices=STRATEGIES
    )

    def __post_init__(self) -> None:
        check(self)
        if self.preprocess is not None and self.from_ is None:
            raise BadInput("--preprocess is for a model of float input; name the model with --from")
        parse_size(self.image_size)


def train(*, out: str | Path, data: str | Path = "digits", **options: Any) -> RunFolder:
    """Train a network, as `resnet train` does, and return its run folder.

    Args:
        out: The run folder to write.
        data: The data set; see `training.data.load`.
        **options: The other options of the command, those of the recipe too, with underscores: `model="resnet20"`,
            `recipe="quick"`, `epochs=5`, `resume=True`; `from_` for --from.

    Raises:
        BadInput: An option, the data or the folder cannot be used.
        CheckFailed: The loss became NaN or infinite; the checkpoint of the epoch before is kept.
    """
    own, values = sort_keywords({"out": out, "data": data} | options, TrainOptions, Recipe)
    chosen = TrainOptions(**own)
    named = chosen.recipe or (QUANTIZE if "quantize" in values else FINETUNE if chosen.from_ else "notebook")
    recipe = dataclasses.replace(RECIPES[named], **values)
    if chosen.from_ is None and recipe.transfers:
        raise BadInput(
            "--freeze, --head-epochs, --source-rate, --frozen-statistics, --quantize and the recipes finetune and "
            "quantize are for a network that has learned something; name it with --from"
        )

    start_tensorflow(recipe.fuse)
    from training import distribute, networks
    from training.train import TrainingSettings
    from training.train import train as run

    model = chosen.model or ("" if chosen.from_ else "resnet18")
    if model:
        networks.check_name(model)
    settings = TrainingSettings(
        data=chosen.data,
        model=model,
        recipe=recipe,
        seed=chosen.seed,
        image_size=chosen.image_size,
        images=chosen.images,
        source=chosen.from_,
        preprocess=chosen.preprocess,
        colors=chosen.colors,
        head=chosen.head,
    )
    strategy = distribute.choose(chosen.distribute, recipe.batch_size)
    run(settings, chosen.out, chosen.resume, chosen.tensorboard, strategy)
    return RunFolder(chosen.out)
