"""Seeds as pure functions of where a run stands, so that no generator state has to be saved or restored."""

import random

import numpy as np
import torch

_MASK = (1 << 64) - 1


def derive_seed(*numbers: int) -> int:
    """A 64-bit seed from several integers (splitmix64, chained), the same on every platform and version."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def seed_everything(seed: int) -> None:
    """Seed torch (every device), numpy and ``random``."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed the generators for one training step of one process (drop path, dropout, mixing).

    A step then draws the same numbers in an uninterrupted run, after a resume and when it is repeated alone.
    """
    seed_everything(derive_seed(seed, step, rank))
