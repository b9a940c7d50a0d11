"""Values that change during training, computed once as arrays."""

import numpy as np


def cosine_schedule(
    base: float,
    final: float,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: float = 0,
    start: float = 0.0,
) -> np.ndarray:
    """One value per step: a linear warm-up from ``start`` to ``base``, then half a cosine towards ``final``.

    The warm-up includes both of its ends, so ``base`` appears twice; the cosine starts at ``base`` and would
    reach ``final`` one step after the last.

    Args:
        base: Value after the warm-up.
        final: Value the cosine ends in.
        epochs: Length of the training, warm-up included.
        steps_per_epoch: Steps in one epoch.
        warmup_epochs: Length of the warm-up; 0 for none.
        start: First value of the warm-up.

    Returns:
        float64 array of shape ``(epochs * steps_per_epoch,)``.

    Raises:
        ValueError: If the warm-up is longer than the training.
    """
    if warmup_epochs > epochs:
        raise ValueError(f"a warm-up of {warmup_epochs} epochs does not fit into {epochs} epochs")
    warmup = np.linspace(start, base, round(warmup_epochs * steps_per_epoch))
    num_steps = epochs * steps_per_epoch - len(warmup)
    progress = np.arange(num_steps) / max(num_steps, 1)
    return np.concatenate([warmup, final + (base - final) / 2 * (1 + np.cos(np.pi * progress))])


def teacher_temperature_schedule(warmup_temp: float, temp: float, warmup_epochs: int, epochs: int) -> np.ndarray:
    """One temperature per epoch: linear from ``warmup_temp`` to ``temp``, both included, then constant.

    Returns:
        float64 array of shape ``(epochs,)``.

    Raises:
        ValueError: If the warm-up is longer than the training.
    """
    if warmup_epochs > epochs:
        raise ValueError(f"a temperature warm-up of {warmup_epochs} epochs does not fit into {epochs} epochs")
    warmup = np.linspace(warmup_temp, temp, warmup_epochs)
    return np.concatenate([warmup, np.full(epochs - warmup_epochs, temp)])
