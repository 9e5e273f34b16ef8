"""Quantization-aware training: a network that rounds as int8 kernels do, and learns to lose little by it.

Jacob et al. (2018), https://arxiv.org/abs/1712.05877, is the method: weights and activations are rounded in the forward
pass, and gradients pass the rounding as if it were not there. The ranges of activations are weights too, which learn by
their gradient (Esser et al. 2020, https://arxiv.org/abs/1902.08153).

The tensors that are rounded are those that the int8 kernels of onnxruntime read and write: what goes into a layer with
weights or an addition, and what comes out of a convolution or an addition, batch normalization and ReLU included. All
else stays in float: other layers between these, and the output of the network.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from numpy.typing import NDArray

LEVELS = 255  # steps of an activation, uint8
LARGEST = 127  # of a weight, int8
RANGE = "low", "high"  # the names of the learned ends of a range
SMALLEST = 1e-6  # width of a range, so that a tensor of zeros has a scale
CALIBRATION_BATCH = 8  # of 224-pixel images, ResNet-50 has 0.7 GB of values

WEIGHTED = (layers.Conv2D, layers.DepthwiseConv2D, layers.Dense)
# Layers whose int8 kernels write uint8, and need to know its scale.
ROUNDING = (layers.Conv2D, layers.DepthwiseConv2D, layers.Add, layers.AveragePooling2D)
# Layers whose output has no other values than their input, and perhaps 0: it is rounded already.
TRANSPARENT = (
    layers.Dropout,
    layers.Flatten,
    layers.Identity,
    layers.MaxPooling2D,
    layers.Reshape,
    layers.SpatialDropout2D,
    layers.ZeroPadding2D,
)

Range = tuple[float, float]


@keras.saving.register_keras_serializable("resnet")
class FakeQuantize(layers.Layer):  # type: ignore[misc]  # Keras has no types
    """Rounds a tensor to the 256 values of a uint8 with a scale and a zero point, which follow from a learned range.

    Attributes:
        low: Lower end of the range; at most 0.
        high: Upper end.
    """

    def __init__(self, low: float, high: float, **options: Any) -> None:
        """Begin with this range; one that begins at 0, as that of a ReLU, always does."""
        super().__init__(**options)
        self._initial = min(low, 0.0), high

    def build(self, _: Any) -> None:  # noqa: D102
        low, high = (keras.initializers.Constant(value) for value in self._initial)
        self.low = self.add_weight(name=RANGE[0], initializer=low, trainable=self._initial[0] < 0)
        self.high = self.add_weight(name=RANGE[1], initializer=high)

    def call(self, x: Any) -> Any:
        """Return the nearest of the 256 values, float32."""
        scale, zero = self.find_grid()
        return (ops.clip(_round(x / scale) + zero, 0, LEVELS) - zero) * scale

    def find_grid(self) -> tuple[Any, Any]:
        """Return the scale, and the zero point, a whole number from 0 to 255 in float32."""
        low = ops.minimum(self.low, 0.0)
        scale = ops.maximum(self.high - low, SMALLEST) / LEVELS
        return scale, ops.clip(_round(-low / scale), 0, LEVELS)

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        config: dict[str, Any] = super().get_config()
        return config | dict(zip(RANGE, self._initial, strict=True))


@keras.saving.register_keras_serializable("resnet")
class QuantizedLayer(layers.Layer):  # type: ignore[misc]  # Keras has no types
    """A layer whose weights are rounded to int8, with a scale for each channel, and the batch normalization after it.

    The normalization is folded into the weights before they are rounded, with its moving statistics, which stay as they
    are: Krishnamoorthi (2018), https://arxiv.org/abs/1806.08342, section 3.2.2.
    """

    def __init__(self, layer: layers.Layer, norm: layers.Layer | None = None, **options: Any) -> None:
        """Use the weights of a layer of `WEIGHTED`, and of a normalization of its output."""
        super().__init__(**options)
        self.layer, self.norm = layer, norm

    def build(self, shape: Any) -> None:  # noqa: D102
        if not self.layer.built:
            self.layer.build(shape)
        if self.norm is not None and not self.norm.built:
            self.norm.build(self.layer.compute_output_shape(shape))

    def compute_output_shape(self, shape: Any) -> Any:  # noqa: D102
        return self.layer.compute_output_shape(shape)

    def call(self, x: Any) -> Any:  # noqa: D102
        layer = self.layer
        kernel, bias = self._fold()
        kernel = _round_channels(kernel, _list_shared_axes(layer))
        if isinstance(layer, layers.Dense):
            y = ops.matmul(x, kernel)
        elif isinstance(layer, layers.DepthwiseConv2D):
            y = ops.depthwise_conv(x, kernel, layer.strides, layer.padding, layer.data_format, layer.dilation_rate)
        else:
            y = layer.convolution_op(x, kernel)
        return layer.activation(y if bias is None else y + bias)

    def _fold(self) -> tuple[Any, Any]:
        """Return kernel and bias of the layer together with its normalization."""
        kernel, bias, norm = self.layer.kernel, self.layer.bias if self.layer.use_bias else None, self.norm
        if norm is None:
            return kernel, bias
        factor = ops.rsqrt(norm.moving_variance + norm.epsilon)
        if norm.scale:
            factor *= norm.gamma
        shift = ((0.0 if bias is None else bias) - norm.moving_mean) * factor
        if norm.center:
            shift += norm.beta
        channels = [1 if axis in _list_shared_axes(self.layer) else side for axis, side in enumerate(kernel.shape)]
        return kernel * ops.reshape(factor, channels), shift

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        config: dict[str, Any] = super().get_config()
        parts = {"layer": self.layer, "norm": self.norm}
        return config | {name: keras.saving.serialize_keras_object(part) for name, part in parts.items()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizedLayer:  # noqa: D102
        parts = {name: keras.saving.deserialize_keras_object(config[name]) for name in ("layer", "norm")}
        return cls(**config | parts)


def quantize(model: keras.Model, images: NDArray[np.uint8]) -> keras.Model:
    """Return a network that computes what a model does, in the arithmetic of int8 kernels.

    Args:
        model: A functional model without models inside it. Its layers become part of the result.
        images: Training images, uint8 [n, height, width, channels], with which the ranges of activations begin.

    Returns:
        A network with `FakeQuantize` and `QuantizedLayer`, which has no moving statistics to update. A layer that
        has no int8 kernel stays in float.
    """
    graph = _Graph(model)
    ranges = _calibrate(model, [step for step in model.operations if graph.is_rounded(step)], images)
    quantized: dict[Any, QuantizedLayer] = {}
    rounded: dict[Any, FakeQuantize] = {}

    def call(step: Any, *args: Any, **kwargs: Any) -> Any:
        if step in graph.norms:
            (y,) = args
        elif isinstance(step, WEIGHTED):
            norm, options = graph.folded.get(step), {"name": step.name, "trainable": step.trainable}
            y = quantized.setdefault(step, QuantizedLayer(step, norm, **options))(*args)
        elif isinstance(step, layers.BatchNormalization):
            y = step(*args, training=False)
        else:
            y = step(*args, **kwargs)
        if step not in ranges:
            return y
        return rounded.setdefault(step, FakeQuantize(*ranges[step], name=f"{step.name}_uint8"))(y)

    return rebuild(model, call)


def restore(network: keras.Model) -> keras.Model:
    """Return what a network from `quantize` was made of: the same layers, with what they have learned, in float.

    Any other network is returned as it is.
    """

    def call(step: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(step, FakeQuantize):
            return args[0]
        if isinstance(step, QuantizedLayer):
            y = step.layer(*args)
            return y if step.norm is None else step.norm(y, training=False)
        return step(*args, **kwargs)

    return rebuild(network, call) if any(isinstance(layer, FakeQuantize) for layer in network.layers) else network


def rebuild(model: keras.Model, call: Callable[..., Any]) -> keras.Model:
    """Return a model of the same input in which `call` is called in the place of each layer and operation."""
    image = keras.Input(batch_shape=model.input_shape, dtype=model.inputs[0].dtype, name=model.inputs[0].name)
    return keras.Model(image, model._run_through_graph([image], call_fn=call), name=model.name)


class _Graph:
    """What follows what in a network without nested models, and what is one kernel in int8.

    Attributes:
        folded: The batch normalization that is a part of a layer, by that layer.
        norms: Those normalizations.
    """

    def __init__(self, model: keras.Model) -> None:
        self._before, self._after = defaultdict(set), defaultdict(set)
        for node in _list_nodes(model):
            for earlier in node.parent_nodes:
                self._before[node.operation].add(earlier.operation)
                self._after[earlier.operation].add(node.operation)
        self._last = {tensor._keras_history.operation for tensor in model.outputs}
        self.folded = {
            step: follower
            for step in model.operations
            if isinstance(step, WEIGHTED) and step.activation is keras.activations.linear
            for follower in self._find_only(step)
            if isinstance(follower, layers.BatchNormalization) and follower.axis in (-1, follower.input_spec.ndim - 1)
        }
        self.norms = set(self.folded.values())

    def is_rounded(self, step: Any) -> bool:
        """Return whether the output of a step is rounded: in one kernel with what follows, only the last one's is."""
        if step in self._last or isinstance(step, (layers.InputLayer, *TRANSPARENT)):
            return False
        if any(self._is_fused(follower) for follower in self._find_only(step)):
            return False
        return self._is_kernel(step) or any(isinstance(reader, (*WEIGHTED, layers.Add)) for reader in self._read(step))

    def _find_only(self, step: Any) -> Collection[Any]:
        """Return the one step that uses the output of a step, in a list; an empty one if there are others."""
        after = self._after[step]
        return after if len(after) == 1 and step not in self._last else ()

    def _is_fused(self, step: Any) -> bool:
        """Return whether a step is a part of the kernel before it."""
        if step in self.norms:
            return True
        befores = self._before[step]
        return _is_relu(step) and all(self._is_kernel(before) and self._find_only(before) for before in befores)

    def _is_kernel(self, step: Any) -> bool:
        return isinstance(step, ROUNDING) or self._is_fused(step)

    def _read(self, step: Any) -> Collection[Any]:
        """Return the steps that use the values of a step."""
        readers = set()
        for follower in self._after[step]:
            readers |= set(self._read(follower)) if isinstance(follower, TRANSPARENT) else {follower}
        return readers


def _is_relu(step: Any) -> bool:
    """Return whether a step only cuts off values below 0, and perhaps those above a limit."""
    if isinstance(step, layers.ReLU):
        return not step.negative_slope and not step.threshold
    return isinstance(step, layers.Activation) and step.activation in (keras.activations.relu, keras.activations.relu6)


def _list_nodes(model: keras.Model) -> list[Any]:
    """Return the calls of layers and operations that a model consists of."""
    return [node for nodes in model._nodes_by_depth.values() for node in nodes]


def _calibrate(model: keras.Model, steps: list[Any], images: NDArray[np.uint8]) -> Mapping[Any, Range]:
    """Return the smallest and the largest value of the outputs of some steps for some images."""
    tensors = {node.operation: node.outputs[0] for node in _list_nodes(model)}
    probe = keras.Model(model.inputs[0], [tensors[step] for step in steps])
    lows, highs = [], []
    for start in range(0, len(images), CALIBRATION_BATCH):
        values = keras.tree.flatten(probe(images[start : start + CALIBRATION_BATCH], training=False))
        lows.append([float(ops.min(value)) for value in values])
        highs.append([float(ops.max(value)) for value in values])
    ends = np.min(lows, axis=0).tolist(), np.max(highs, axis=0).tolist()
    return dict(zip(steps, zip(*ends, strict=True), strict=True))


def _list_shared_axes(layer: layers.Layer) -> tuple[int, ...]:
    """Return the axes of a kernel along which one scale holds: all but that of the output channels."""
    rank = len(layer.kernel.shape)
    return tuple(range(rank - 2 if isinstance(layer, layers.DepthwiseConv2D) else rank - 1))


def _round_channels(kernel: Any, axes: tuple[int, ...]) -> Any:
    """Return a kernel rounded to whole multiples, -127 to 127, of a scale; the largest weight has that of 127."""
    largest = ops.max(ops.abs(kernel), axis=axes, keepdims=True)
    scale = ops.stop_gradient(ops.maximum(largest, SMALLEST)) / LARGEST
    return _round(kernel / scale) * scale


def _round(x: Any) -> Any:
    """Round to a whole number; the gradient is 1."""
    return x + ops.stop_gradient(ops.round(x) - x)
