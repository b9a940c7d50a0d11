"""Tensors made of names, or of a seed: what the golden files use for weights that are too large to store."""

import zlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def portions(name: str, count: int, size: int = 1 << 16) -> Iterator[np.ndarray]:
    """The first ``count`` values of :func:`uniform`, in portions that fit a processor's cache."""
    with np.errstate(over="ignore"):
        salt = np.uint64(zlib.crc32(name.encode()) + 1) * np.uint64(0xBF58476D1CE4E5B9)
    for start in range(0, count, size):
        x = np.arange(start + 1, min(start + size, count) + 1, dtype=np.uint64)
        x *= np.uint64(0x9E3779B97F4A7C15)
        x += salt
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        yield (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 values in [0, 1): element i is a hash (splitmix64) of i and of the CRC-32 of ``name``."""
    return np.concatenate(list(portions(name, int(np.prod(shape))))).reshape(shape)


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
        low, high = _value_range(key, value.shape)
        numbers = portions(salt + key.replace("module.", ""), value.numel())
        parts = [(low + (high - low) * u).astype(np.float32) for u in numbers]  # VGG16 has 100 million weights in one
        filled[key] = torch.from_numpy(np.concatenate(parts)).reshape(value.shape)
    return filled


def seed_filled(state_dict: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The state dict with every entry but counters drawn with a seed of its own, counted up in the order of names."""
    filled = dict(state_dict)
    names = sorted(name for name in state_dict if not name.endswith("num_batches_tracked"))
    for i, name in enumerate(names):
        shape = tuple(state_dict[name].shape)
        values = np.random.RandomState(seed + i).standard_normal(shape)
        if len(shape) in (2, 4):
            values = values / np.sqrt(np.prod(shape[1:]))
        elif len(shape) == 3:
            values = 0.2 * values
        elif name.endswith("running_var"):
            values = 1 + 0.2 * np.abs(values)
        else:
            values = (1 if name.endswith(".weight") else 0) + 0.1 * values
        filled[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return filled


def _value_range(key: str, shape: torch.Size) -> tuple[float, float]:
    """The interval from which the values of an entry are."""
    if key.endswith("running_var"):
        return 1.0, 1.5
    if len(shape) >= 2:
        bound = np.sqrt(3 / np.prod(shape[1:]))
        return -bound, bound
    return (0.9, 1.1) if key.endswith("weight") else (-0.1, 0.1)  # running means, biases
