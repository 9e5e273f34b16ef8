"""Answers from an image and its mirror image: the mean of the features of both goes into the last layer."""

from __future__ import annotations

import keras
from keras import layers, ops

from training.model import HEAD

BOTH = "image_and_mirror_image"


def mirror(network: keras.Model) -> keras.Model:
    """Return a network with the layers of another one, which looks at each image twice, once mirrored.

    Args:
        network: A functional model without models inside it, whose last layer is `HEAD`.

    Returns:
        A model of the same input and output. The mirror images follow the images in one batch of twice the size, so
        that each layer is called once.
    """
    image, head = _copy_input(network), network.get_layer(HEAD)
    turned = _name(image[:, :, ::-1], "mirror_image")
    both = layers.Concatenate(axis=0, name=BOTH)([image, turned])
    features = _apply(keras.Model(network.inputs[0], _find_input(network.outputs[0])), both)
    pairs = _name(ops.reshape(features, (2, -1, features.shape[-1])), "features_of_both")
    mean = _name(ops.mean(pairs, axis=0), "mean_features")
    return keras.Model(image, head(mean), name=network.name)


def restore(network: keras.Model) -> keras.Model:
    """Return what a network from `mirror` was made of; any other network is returned as it is."""
    if BOTH not in {layer.name for layer in network.layers}:
        return network
    image, head = _copy_input(network), network.layers[-1]
    pairs = _find_input(_find_input(network.outputs[0]))
    features = keras.Model(network.get_layer(BOTH).output, _find_input(pairs))
    return keras.Model(image, head(_apply(features, image)), name=network.name)


def _copy_input(network: keras.Model) -> keras.KerasTensor:
    (image,) = network.inputs
    return keras.Input(batch_shape=image.shape, dtype=image.dtype, name=image.name)


def _find_input(tensor: keras.KerasTensor) -> keras.KerasTensor:
    """Return what a tensor was made of. The layer that made it may have been called in other networks too."""
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index].input_tensors[0]


def _apply(network: keras.Model, x: keras.KerasTensor) -> keras.KerasTensor:
    """Call each layer of a network; calling the network would make it a layer."""
    return network._run_through_graph([x], operation_fn=lambda step: step)


def _name(tensor: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """Name what makes a tensor. Keras gives names that the operations of a loaded model may have already."""
    tensor._keras_history.operation.name = name
    return tensor
