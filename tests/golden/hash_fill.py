"""Tensors that are functions of their names: what the golden files use for weights that are too large to store."""

import zlib

import numpy as np
import torch
from torch import Tensor


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 values in [0, 1): element i is a hash (splitmix64) of i and of the CRC-32 of ``name``."""
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        salt = np.uint64(zlib.crc32(name.encode()) + 1) * np.uint64(0xBF58476D1CE4E5B9)
        x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + salt
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return ((x >> np.uint64(11)).astype(np.float64) / 2.0**53).reshape(shape)


def hash_input(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values in [-1, 1)."""
    return torch.from_numpy((2 * uniform(name, shape) - 1).astype(np.float32))


def hash_filled(state_dict: dict[str, Tensor], salt: str = "") -> dict[str, Tensor]:
    """The state dict with every entry filled by its name; counters and everything below ``sobel`` stay."""
    filled = {}
    for key, value in state_dict.items():
        if key.endswith("num_batches_tracked") or key.startswith("sobel"):
            filled[key] = value
            continue
        u = uniform(salt + key.replace("module.", ""), tuple(value.shape))
        s = 2 * u - 1
        if key.endswith("running_var"):
            filled_value = 1 + 0.5 * u
        elif value.ndim >= 2:
            filled_value = s * np.sqrt(3 / np.prod(value.shape[1:]))
        elif key.endswith("weight"):
            filled_value = 1 + 0.1 * s
        else:  # running means, biases
            filled_value = 0.1 * s
        filled[key] = torch.from_numpy(filled_value.astype(np.float32))
    return filled
