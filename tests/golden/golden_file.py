"""Golden arrays of one method, with a record of which of them a test has read."""

import json
import os
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data"


class GoldenFile:
    """``<folder>/<method>/golden.npz``; the folder is ``$GOLDEN_DIR`` or this project's own copy.

    Every ``golden[key]`` counts as a use of that array: the last test of a method's module calls
    :meth:`unread` and fails when an array was never compared.
    """

    def __init__(self, method: str):
        self.path = Path(os.environ.get("GOLDEN_DIR", DATA)) / method / "golden.npz"
        with np.load(self.path, allow_pickle=False) as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}
        self.read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> np.ndarray:
        self.read.add(key)
        return self.arrays[key]

    def tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self[key]))  # a copy, and 0-d arrays stay tensors

    def scalar(self, key: str) -> float | int:
        return self[key].item()

    def json(self, key: str):
        return json.loads(self[key].item())

    def keys(self, prefix: str = "") -> list[str]:
        """Names that start with ``prefix``, in file order (does not count as a use)."""
        return [key for key in self.arrays if key.startswith(prefix)]

    def cases(self, prefix: str) -> list[str]:
        """Distinct next path parts below ``prefix`` (``"loss/"`` -> ``["meta_f64", "epoch0", ...]``)."""
        return list(dict.fromkeys(key[len(prefix) :].split("/")[0] for key in self.keys(prefix)))

    def state_dict(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors below ``prefix`` under their state-dict names."""
        return {key[len(prefix) :]: self.tensor(key) for key in self.keys(prefix)}

    def unread(self, prefix: str = "") -> list[str]:
        return [key for key in self.keys(prefix) if key not in self.read]
