"""The values that change at every step of MSN: all of them are planned for 1.25 times the length of the run.

Arrays have one float64 value per step of the run; the scheduler of the learning rate and that of the weight decay are
moved before an update, so their first value is that of step 1 and not of step 0.
"""

import argparse
from dataclasses import dataclass

import numpy as np
import torch

STRETCH = 1.25  # training ends after 80 % of each schedule


def learning_rates(
    start: float, peak: float, final: float, epochs: int, steps_per_epoch: int, warmup_epochs: float
) -> np.ndarray:
    """A linear warm-up from ``start`` to ``peak``, then a cosine towards ``final``."""
    step = np.arange(1, epochs * steps_per_epoch + 1)
    warmup, total = int(warmup_epochs * steps_per_epoch), int(STRETCH * epochs * steps_per_epoch)
    progress = (step - warmup) / max(1, total - warmup)
    cosine = np.maximum(final, final + (peak - final) / 2 * (1 + np.cos(np.pi * progress)))
    return np.where(step < warmup, start + step / max(1, warmup) * (peak - start), cosine)


def weight_decays(start: float, final: float, epochs: int, steps_per_epoch: int) -> np.ndarray:
    """A cosine from ``start`` towards ``final``."""
    step = np.arange(1, epochs * steps_per_epoch + 1)
    total = int(STRETCH * epochs * steps_per_epoch)
    return final + (start - final) / 2 * (1 + np.cos(np.pi * step / total))


def linear(start: float, final: float, epochs: int, steps_per_epoch: int) -> np.ndarray:
    """A straight line from ``start`` towards ``final``: the EMA momentum and the sharpening."""
    step = np.arange(epochs * steps_per_epoch)
    return start + step * (final - start) / (STRETCH * epochs * steps_per_epoch)


@dataclass
class Schedules:
    """One value per training step of the learning rate, weight decay, EMA momentum and sharpening temperature."""

    lr: np.ndarray
    weight_decay: np.ndarray
    momentum: np.ndarray
    sharpen: np.ndarray

    @classmethod
    def from_args(cls, args: argparse.Namespace, steps_per_epoch: int) -> "Schedules":
        length = (args.epochs, steps_per_epoch)
        return cls(
            lr=learning_rates(args.start_lr, args.lr, args.final_lr, *length, args.warmup),
            weight_decay=weight_decays(args.weight_decay, args.final_weight_decay, *length),
            momentum=linear(*args.ema, *length),
            sharpen=linear(args.start_sharpen, args.final_sharpen, *length),
        )

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = float(self.lr[step])
            if i == 0:  # biases, norms and prototypes never decay
                group["weight_decay"] = float(self.weight_decay[step])
