"""Data-parallel training on several devices or machines."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from resnet import BadInput

if TYPE_CHECKING:
    import keras

STRATEGIES = ("mirrored", "multiworker")


def choose(name: str | None, batch_size: int) -> Any | None:
    """Return the tf.distribute.Strategy that splits every batch among several devices.

    Each device takes an equal part of the batch, and their gradients are summed. The result is that of one device,
    except for the statistics of batch normalisation: every device computes them on its own part. With several machines
    each writes its own run folder; all weights but those statistics are equal, so that any of the models can be used.

    Args:
        name: `mirrored` for all GPUs of this machine, `multiworker` for the machines that the environment variable
            TF_CONFIG names, None for one device.
        batch_size: Images per step, on all devices together.

    Returns:
        The strategy, or None for one device.

    Raises:
        BadInput: The strategy or TF_CONFIG cannot be used, or the batch cannot be split into equal parts.
    """
    if name is None:
        return None
    import keras

    if keras.backend.backend() != "tensorflow":
        raise BadInput("--distribute needs TensorFlow; unset KERAS_BACKEND, or train on one device")
    import tensorflow as tf

    if name == "multiworker":
        if "TF_CONFIG" not in os.environ:
            raise BadInput(
                "--distribute multiworker needs TF_CONFIG with the addresses of all machines and the index of this one"
            )
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
        except Exception as error:  # of TensorFlow or of Python, as the mistake is
            reason = str(error).partition("\n")[0].rstrip(".")
            raise BadInput(f"TF_CONFIG cannot be used ({reason}); docs/training.md has an example") from None
    else:
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
    replicas = strategy.num_replicas_in_sync
    if batch_size % replicas:
        raise BadInput(f"--batch-size {batch_size} is not a multiple of the {replicas} devices; choose one that is")
    print(f"splitting every batch of {batch_size} images among {replicas} devices")
    return strategy


def prepare(network: keras.Model, strategy: Any) -> None:
    """Work around two defects of Keras 3 on several machines; with another strategy do nothing.

    Keras averages every metric of a step along its first axis, which scalars do not have. And it cannot read the shape
    of a batch that is distributed over several machines (https://github.com/keras-team/keras/issues/20585).
    """
    import tensorflow as tf

    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return
    image, probabilities = (tf.zeros((1, *shape[1:])) for shape in (network.input_shape, network.output_shape))
    with strategy.scope():
        network._symbolic_build(data_batch=(tf.cast(image, tf.uint8), probabilities))
    network._maybe_symbolic_build = lambda *_args, **_kwargs: None
    for name in ("train_step", "test_step"):
        setattr(network, name, _with_axis(getattr(network, name)))


def _with_axis(step: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    def wrapper(batch: Any) -> dict[str, Any]:
        import tensorflow as tf

        return {name: tf.expand_dims(value, 0) for name, value in step(batch).items()}

    return wrapper
