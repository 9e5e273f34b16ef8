"""Fine-tuning: a training that starts from the layers and weights of another network.

`load` reads what `--from` names, `build` makes of it a network for the images and classes of the data, and `slow_down`
has what was there change more slowly than the new head.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from resnet import BadInput
from training import applications, mirroring, model_file, networks, preprocessing, quantization
from training.applications import APPLICATIONS
from training.model import HEAD, MOMENTUM, classify
from training.recipes import ALL_BUT_HEAD, Recipe
from training.run_folder import RunFolder

IMAGENET = "imagenet"
IMAGENET_SHAPE = (224, 224, 3)
NO_CLASSES = 1  # a head that no data set fits, so that it is replaced


@dataclass(frozen=True)
class Pretrained:
    """A network to start from.

    Attributes:
        name: What to call it: the name of a run folder or file, or `imagenet`.
        sha256: Hash of the file of the model; of the weights, if Keras downloaded them.
        network: The network, in float32.
        labels: The names of its classes, in the order of its outputs; empty if they are not known.
        preprocess: One of `training.preprocessing.PREPROCESSING` for a network of float input, else None.
        head: One of `training.heads.HEADS`; None if the weights of its head mean nothing.
        mirrored: Whether it was made by `training.mirroring`; `network` is what it was made of.
    """

    name: str
    sha256: str
    network: keras.Model
    labels: tuple[str, ...] = ()
    preprocess: str | None = None
    head: str | None = None
    mirrored: bool = False

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of its images; None if it takes any size."""
        height, width = self.network.input_shape[1:3]
        return (height, width) if height and width else None

    @property
    def channels(self) -> int:
        """Channels of its images."""
        return int(self.network.input_shape[3])

    def describe(self, network: keras.Model) -> dict[str, Any]:
        """Return what metrics.json says of the source of a network from `build`."""
        frozen = sum(layer.count_params() for layer in network.layers if not layer.trainable)
        return {"name": self.name, "sha256": self.sha256, "frozen_parameters": frozen}


def load(source: str, architecture: str, preprocess: str | None, resumed: RunFolder | None) -> Pretrained:
    """Load what `--from` names.

    Args:
        source: A run folder, a .keras or .h5 file of a Keras classifier, a file of weights, or `imagenet`.
        architecture: The name of the network. Weights alone need it, and `imagenet`; of a network it is checked, unless
            it is empty.
        preprocess: The preprocessing that a network of float input expects; None for one of uint8 pixels.
        resumed: The run folder of a training that goes on. Its checkpoint has all that was learned, so that the source
            need not be there any more.

    Raises:
        BadInput: There is no such source, or it cannot be used.
    """
    path = Path(source)
    name = IMAGENET if source == IMAGENET else path.resolve().name
    if resumed is not None and resumed.checkpoint.exists():
        there = source != IMAGENET and path.exists()
        digest = _hash(model_file.find(path)) if there else str(resumed.read_settings().get("source_sha256"))
        network = quantization.restore(model_file.load(resumed.checkpoint))
        mirrored = bool(resumed.read_settings().get("mirror"))
        return Pretrained(name, digest, network, _read_labels(resumed.folder), None, _find_head(network), mirrored)
    if source == IMAGENET:
        return _load_imagenet(architecture)
    file = model_file.find(path)
    if _holds_weights_only(file):
        return Pretrained(name, _hash(file), _load_weights(file, architecture))
    loaded = model_file.load(file)
    network = mirroring.restore(loaded)
    model_file.check_shapes(file, network, preprocess)
    if architecture:
        _check_layers(name, network, architecture)
    labels, mirrored = _read_labels(file.parent), network is not loaded
    return Pretrained(name, _hash(file), network, labels, preprocess, _find_head(network), mirrored)


def _find_head(network: keras.Model) -> str:
    return "sigmoid" if network.output_shape[-1] == 1 else "softmax"


def _load_imagenet(architecture: str) -> Pretrained:
    if architecture not in APPLICATIONS:
        known = f"keras-{architecture}"
        advice = f"--model {known}" if known in APPLICATIONS else f"--model with one of {', '.join(APPLICATIONS)}"
        raise BadInput(f"--from imagenet has weights for the networks of keras.applications only; pass {advice}")
    try:
        network = applications.build(architecture, IMAGENET_SHAPE, NO_CLASSES, IMAGENET)
    except Exception as error:  # Keras raises a bare Exception when the download fails
        raise BadInput(
            f"the weights of {architecture} could not be downloaded ({error}); download that file where there is a "
            "network, and put it into ~/.keras/models, or name it by --from"
        ) from None
    digest = hashlib.sha256()
    for layer in _list_weighted(network)[:-1]:
        for weight in layer.get_weights():
            digest.update(np.ascontiguousarray(weight).data)
    return Pretrained(IMAGENET, digest.hexdigest(), network)


def _holds_weights_only(file: Path) -> bool:
    if not h5py.is_hdf5(file):
        return False
    with h5py.File(file) as store:
        return "model_config" not in store.attrs


def _load_weights(file: Path, architecture: str) -> keras.Model:
    """Return a named network with the weights of a file, all but those of its head."""
    if not architecture:
        raise BadInput(f"{file} holds weights without a network; name the network with --model")
    try:
        with warnings.catch_warnings(action="ignore"):  # of what the file has not: if it has weights, it is an error
            if architecture in APPLICATIONS:
                return applications.build(architecture, IMAGENET_SHAPE, NO_CLASSES, str(file))
            network = networks.build(architecture, IMAGENET_SHAPE, NO_CLASSES)
            keras.Model(network.inputs, network.get_layer(HEAD).input).load_weights(file)
    except Exception as error:  # Keras raises many types
        # Keras counts first what does not fit, and then says why of one layer.
        _, _, example = str(error).rpartition("Example error message for object ")
        reason = " ".join(line.strip() for line in example.strip().splitlines()[:3]).strip()
        raise BadInput(f"the weights in {file} do not fit --model {architecture}: {reason}") from None
    return network


def _check_layers(name: str, network: keras.Model, architecture: str) -> None:
    """Check that a network has the layers of a named one, in the same order, apart from its head."""
    height, width = network.input_shape[1:3]
    shape = (height or IMAGENET_SHAPE[0], width or IMAGENET_SHAPE[1], network.input_shape[3])
    expected = networks.build(architecture, shape, NO_CLASSES)
    for ours, theirs in zip_longest(*(_list_weighted(each)[:-1] for each in (expected, network))):
        if ours is None or theirs is None or _list_shapes(ours) != _list_shapes(theirs):
            has, needs = (_describe(layer) if layer else "no layer" for layer in (theirs, ours))
            raise BadInput(
                f"--from {name} does not fit --model {architecture}: it has {has} where that network has {needs}; "
                "leave out --model to take the network of the source"
            )


def _read_labels(folder: Path) -> tuple[str, ...]:
    """Return the names of the classes from beside a model, in a run folder or a version of an export; () without."""
    found = [path for path in (folder / "labels.txt", folder / "manifest.json") if path.exists()]
    if not found:
        return ()
    path = found[0]
    try:
        text = path.read_text("utf-8")
        return tuple(json.loads(text)["labels"] if path.suffix == ".json" else text.splitlines())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path} cannot be read ({error}); copy the model elsewhere, and the network has classes without names"
        ) from None


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def build(
    pretrained: Pretrained, image_shape: tuple[int, int, int], classes: Sequence[str], outputs: int, recipe: Recipe
) -> keras.Model:
    """Build a classifier from the layers and weights of another one, in the dtype policy of Keras.

    The head is new. Its weights are those of the source for classes that the source has under the same names, or for
    all if there are as many and their names are not known; the others are zero.

    Args:
        pretrained: The other one.
        image_shape: (height, width, channels) of the images.
        classes: The names of the classes.
        outputs: See `training.model.classify`.
        recipe: Its values `freeze` and `frozen_statistics` are used.

    Returns:
        A model from `image`, uint8 [batch, height, width, channels], to `probabilities`, float32 [batch, outputs].

    Raises:
        BadInput: The source takes no images of this size, or has no layer that could be replaced; or nothing is left to
            train.
    """
    source = pretrained.network
    image = keras.Input(image_shape, dtype="uint8", name="image")
    pixels = preprocessing.apply(pretrained.preprocess, image)
    entry = image if pixels is image else keras.Input(pixels.shape[1:], dtype=source.inputs[0].dtype)
    try:
        copied = _copy(source, entry)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        height, width = pretrained.size or IMAGENET_SHAPE[:2]
        raise BadInput(
            f"--from {pretrained.name} takes no images of {image_shape[1]}x{image_shape[0]} pixels ({reason}); "
            f"it was made for {width}x{height}"
        ) from None
    features = _find_features(copied, pretrained.name)
    if pixels is not image:
        features = keras.Model(entry, features).call(pixels)
    network = keras.Model(image, classify(features, outputs), name=source.name)
    _keep_classes(network.get_layer(HEAD), pretrained, classes)
    _freeze(network, recipe)
    return network


def _copy(network: keras.Model, entry: keras.KerasTensor) -> keras.Model:
    """Return a network with the same layers and weights on another input; layers of networks within become its own.

    Raises:
        ValueError: A layer does not take what the layers before it make of this input.
    """
    policy = keras.config.dtype_policy().name
    copies: list[tuple[keras.Layer, keras.Layer]] = []

    def copy(layer: Any) -> Any:
        if isinstance(layer, keras.Model) or not isinstance(layer, keras.Layer):  # `call` opens it; it has no weights
            return layer
        config = layer.get_config() | {"trainable": True}
        if layer.dtype_policy.name == "float32":
            config["dtype"] = policy
        if isinstance(layer, keras.layers.BatchNormalization):
            config["momentum"] = MOMENTUM
        copies.append((type(layer).from_config(config), layer))
        return copies[-1][0]

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(layer, keras.Model):
            (x,), (inside,), (y,) = args, layer.inputs, layer.outputs
            return _copy(keras.Model(inside, y), keras.Input(x.shape[1:], dtype=x.dtype)).call(x)
        kwargs.pop("training", None)  # whether dropout and batch normalization are at work is for us to say
        return layer(*args, **kwargs)

    copied = keras.models.clone_model(network, entry, clone_function=copy, call_function=call)
    for ours, theirs in copies:
        _set_weights(ours, theirs)
    return copied


def _set_weights(ours: keras.Layer, theirs: keras.Layer) -> None:
    ours.set_weights(theirs.get_weights())
    if isinstance(ours, keras.layers.Normalization):
        ours.finalize_state()  # it computes others of them


def _find_features(network: keras.Model, name: str) -> keras.KerasTensor:
    """Return the input of the last layer with a kernel, which tells the classes of a network apart."""
    tensor = network.outputs[0]
    while True:
        operation = tensor._keras_history.operation
        before = None if isinstance(operation, keras.layers.InputLayer) else operation.input
        if not isinstance(before, keras.KerasTensor):
            raise BadInput(f"--from {name} ends in {operation.name!r}, and not in a layer that could be replaced")
        if _has_kernel(operation):
            return before
        tensor = before


def _keep_classes(head: keras.layers.Dense, pretrained: Pretrained, classes: Sequence[str]) -> None:
    """Set the weights of a new head: those of classes that the source has too, zeros for the others."""
    old = _list_weighted(pretrained.network)[-1]
    kept = np.zeros((head.kernel.shape[0] + 1, len(classes)), np.float32)  # the last row is the bias
    if pretrained.head and isinstance(old, keras.layers.Dense) and len(old.kernel.shape) == 2:
        there = np.vstack([old.kernel, old.bias if old.use_bias else np.zeros(old.units)])
        if old.units == 1:  # the logit of the second class; that of the first is 0
            there = np.pad(there, ((0, 0), (1, 0)))
        known = pretrained.labels or (tuple(classes) if there.shape[1] == len(classes) else ())
        if len(known) == there.shape[1]:
            for new, name in enumerate(classes):
                if name in known:
                    kept[:, new] = there[:, known.index(name)]
    if head.units == 1:
        kept = kept[:, 1:] - kept[:, :1]
    head.set_weights([kept[:-1], kept[-1]])


def _freeze(network: keras.Model, recipe: Recipe) -> None:
    """Have the first layers keep their weights: as many with kernels as `freeze` says, and what is between them.

    With `frozen_statistics` all batch normalization does, because Keras freezes statistics with scale and shift only.
    """
    for layer in network.layers:
        layer.trainable = not (recipe.frozen_statistics and isinstance(layer, keras.layers.BatchNormalization))
    if not recipe.freeze:
        return
    kernels = [index for index, layer in enumerate(network.layers) if _has_kernel(layer)]
    count = len(kernels) - 1 if recipe.freeze == ALL_BUT_HEAD else int(recipe.freeze)
    if count >= len(kernels):
        raise BadInput(
            f"--freeze {count} leaves nothing to train: the network has {len(kernels)} convolutions and dense layers, "
            f"the head among them; freeze at most {len(kernels) - 1}"
        )
    for layer in network.layers[: kernels[count]]:
        layer.trainable = False


def slow_down(network: keras.Model, recipe: Recipe, steps: int) -> None:
    """Have a compiled network change the weights of its source by a fraction of the learning rate.

    Args:
        network: From `build`, compiled.
        recipe: Its values `source_rate` and `head_epochs` are used.
        steps: Steps per epoch. In the first `head_epochs` epochs, but at most half of all, only the head learns.
    """
    optimizer, head = network.optimizer, {id(weight) for weight in network.get_layer(HEAD).trainable_variables}
    slow = [id(weight) not in head for weight in network.trainable_variables]
    update, decay = optimizer.update_step, optimizer._apply_weight_decay
    warmup = min(recipe.head_epochs, recipe.epochs // 2) * steps

    def update_step(gradient: Any, variable: Any, learning_rate: Any) -> None:
        if slow[optimizer._get_variable_index(variable)]:
            begun = keras.ops.cast(optimizer.iterations >= warmup, "float32")
            learning_rate = keras.ops.cast(learning_rate, "float32") * begun * recipe.source_rate
            if optimizer.weight_decay and optimizer._use_weight_decay(variable):
                optimizer.assign_sub(variable, variable * learning_rate * optimizer.weight_decay)
        update(gradient, variable, learning_rate)

    # Keras decays weights by the learning rate of the optimizer: for those of the source, `update_step` does it.
    def apply_weight_decay(variables: list[Any]) -> None:
        decay([variable for variable in variables if id(variable) in head])

    optimizer.update_step, optimizer._apply_weight_decay = update_step, apply_weight_decay


def _list_weighted(network: keras.Model) -> list[keras.Layer]:
    """Return the layers with weights, also those of networks within, up to the last with a kernel."""
    layers = [layer for layer in _list_layers(network) if layer.weights]
    while layers and not _has_kernel(layers[-1]):
        layers.pop()
    return layers


def _list_layers(network: keras.Model) -> Iterator[keras.Layer]:
    for layer in network.layers:
        if isinstance(layer, keras.Model):
            yield from _list_layers(layer)
        else:
            yield layer


def _has_kernel(layer: Any) -> bool:
    return isinstance(layer, keras.Layer) and any("kernel" in weight.name for weight in layer.weights)


def _list_shapes(layer: keras.Layer) -> list[tuple[int, ...]]:
    return [tuple(weight.shape) for weight in layer.weights]


def _describe(layer: keras.Layer) -> str:
    return f"{layer.name!r} with weights of {', '.join(str(list(shape)) for shape in _list_shapes(layer))}"
