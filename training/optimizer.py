"""Optimizer, learning rate schedule and loss of a recipe."""

from __future__ import annotations

from typing import Any

import keras

from training.quantization import RANGE
from training.recipes import Recipe


def compile_for(network: keras.Model, recipe: Recipe, steps: int) -> None:
    """Compile a network with the optimizer, loss and metric of a recipe, for `steps` steps in all."""
    average: dict[str, Any] = {"use_ema": True, "ema_momentum": recipe.weight_average} if recipe.weight_average else {}
    rate = schedule(recipe, steps)
    if recipe.optimizer == "adam":
        optimizer = keras.optimizers.Adam(rate, weight_decay=recipe.weight_decay or None, **average)
    else:
        momentum = 0.9
        # Keras subtracts weight decay from the weights, outside of the gradient. An L2 penalty is part of the gradient,
        # so that momentum multiplies it by 1 / (1 - momentum).
        decay = recipe.weight_decay / (1 - momentum) or None
        nesterov = recipe.optimizer == "nesterov"
        optimizer = keras.optimizers.SGD(rate, momentum, nesterov=nesterov, weight_decay=decay, **average)
    if recipe.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias", *RANGE])
    is_single = network.output_shape[-1] == 1
    loss = keras.losses.BinaryCrossentropy if is_single else keras.losses.CategoricalCrossentropy
    network.compile(
        optimizer,
        loss=loss(label_smoothing=recipe.label_smoothing),
        metrics=["accuracy"],
        # On the CPU, XLA makes a step of ResNet-18 about three times slower. JAX cannot do without it.
        jit_compile=keras.backend.backend() == "jax",
    )


def schedule(recipe: Recipe, steps: int) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """Return the learning rate for a training of `steps` steps, as the optimizers of Keras take it."""
    peak = recipe.learning_rate
    if recipe.schedule == "steps":
        rates = [peak, peak / 10, peak / 100]
        return keras.optimizers.schedules.PiecewiseConstantDecay([steps // 2, steps * 3 // 4], rates)
    if recipe.schedule == "cosine":
        warmup = round(recipe.warmup * steps)
        if not warmup:
            return keras.optimizers.schedules.CosineDecay(peak, steps)
        return keras.optimizers.schedules.CosineDecay(0.0, steps - warmup, warmup_target=peak, warmup_steps=warmup)
    return peak
