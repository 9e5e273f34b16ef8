"""Several devices that share the work of a training."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import keras

from resnet import BadInput

STRATEGIES = ("mirrored", "multiworker")


def choose(name: str | None, batch_size: int) -> Any | None:
    """Return the tf.distribute.Strategy that shares the work of every step among several devices.

    Each device takes an equal part of the batch, and their gradients are summed: the result is that of one device, but
    for the statistics of batch normalisation, which every device takes from its own part. Of several machines each
    saves its own: their other weights are equal, and the model of any one is whole.

    Args:
        name: `mirrored` for all GPUs of this machine, `multiworker` for the machines that the environment variable
            TF_CONFIG names, None for one device.
        batch_size: Images of a step, all devices together.

    Returns:
        The strategy, or None for one device.

    Raises:
        BadInput: The strategy is unknown or cannot be had, or the devices would have unequal parts.
    """
    if name is None:
        return None
    if name not in STRATEGIES:
        raise BadInput(f"--distribute {name!r} is unknown; choose one of {', '.join(STRATEGIES)}")
    if keras.backend.backend() != "tensorflow":
        raise BadInput("--distribute needs TensorFlow; unset KERAS_BACKEND, or train on one device")
    import tensorflow as tf

    if name == "multiworker":
        if "TF_CONFIG" not in os.environ:
            raise BadInput("--distribute multiworker needs TF_CONFIG, which names the machines and this one's place")
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        strategy = tf.distribute.MirroredStrategy([device.name for device in devices])
    replicas = strategy.num_replicas_in_sync
    if batch_size % replicas:
        raise BadInput(f"--batch-size {batch_size} does not divide among {replicas} devices; choose a multiple")
    print(f"sharing every batch of {batch_size} images among {replicas} devices")
    return strategy


def prepare(network: keras.Model, strategy: Any) -> None:
    """Mend what keeps Keras 3 from training a compiled model on several machines; elsewhere do nothing.

    Keras takes the mean of every figure of a step along its first axis, and scalars have none; and it cannot take a
    batch apart that lies on several machines, to learn its shape (https://github.com/keras-team/keras/issues/20585).
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
