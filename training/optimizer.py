"""The optimizer, the schedule and the loss that a recipe asks for."""

from __future__ import annotations

from typing import Any

import keras

from training.recipes import Recipe


def compile_for(network: keras.Model, recipe: Recipe, steps: int) -> None:
    """Give `network` its optimizer, loss and metric, for a training of so many steps."""
    average: dict[str, Any] = {"use_ema": True, "ema_momentum": recipe.weight_average} if recipe.weight_average else {}
    rate = schedule(recipe, steps)
    if recipe.optimizer == "adam":
        optimizer = keras.optimizers.Adam(rate, weight_decay=recipe.weight_decay or None, **average)
    else:
        momentum = 0.9
        # Keras shrinks the weights beside the gradient step. An L2 penalty goes through the momentum instead, which
        # adds up to 1 / (1 - momentum) times as much.
        decay = recipe.weight_decay / (1 - momentum) or None
        nesterov = recipe.optimizer == "nesterov"
        optimizer = keras.optimizers.SGD(rate, momentum, nesterov=nesterov, weight_decay=decay, **average)
    if recipe.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    network.compile(
        optimizer,
        loss=keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing),
        metrics=["accuracy"],
        # XLA on the CPU takes about three times as long for a step of ResNet-18; JAX has nothing else.
        jit_compile=keras.backend.backend() == "jax",
    )


def schedule(recipe: Recipe, steps: int) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """Return the learning rate of a training of so many steps, as Keras' optimizers take it."""
    peak = recipe.learning_rate
    if recipe.schedule == "steps":
        rates = [peak, peak / 10, peak / 100]
        return keras.optimizers.schedules.PiecewiseConstantDecay([steps // 2, steps * 3 // 4], rates)
    if recipe.schedule == "cosine":
        rising = round(recipe.warmup * steps)
        if not rising:
            return keras.optimizers.schedules.CosineDecay(peak, steps)
        return keras.optimizers.schedules.CosineDecay(0.0, steps - rising, warmup_target=peak, warmup_steps=rising)
    return peak
