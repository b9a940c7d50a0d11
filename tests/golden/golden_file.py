"""Golden arrays of one method, with a record of which of them a test has read."""

import json
import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(np.array(self[key]))  # a copy, and 0-d arrays stay tensors

    def scalar(self, key: str) -> float | int:
        return self[key].item()

    def number(self, case: str, name: str) -> float | int:
        """A parameter of a case, which the file stores in float32: the shortest number that rounds to it."""
        value = float(str(np.float32(self[f"{case}/in/{name}"])))
        return int(value) if value == int(value) else value

    def numbers(self, case: str, *names: str) -> list[float | int]:
        return [self.number(case, name) for name in names]

    def json(self, key: str):
        return json.loads(self[key].item())

    def keys(self, prefix: str = "") -> list[str]:
        """Names that start with ``prefix``, in file order (does not count as a use)."""
        return [key for key in self.arrays if key.startswith(prefix)]

    def cases(self, prefix: str, *starts: str) -> list[str]:
        """Distinct next path parts below ``prefix`` (``"loss/"`` -> ``["meta_f64", "epoch0", ...]``).

        Args:
            starts: Only those that start with one of these.
        """
        found = dict.fromkeys(key[len(prefix) :].split("/")[0] for key in self.keys(prefix))
        return [case for case in found if case.startswith(starts or "")]

    def families(self, *names: str) -> list[str]:
        """``name/case`` of every case of these."""
        return [f"{name}/{case}" for name in names for case in self.cases(f"{name}/")]

    def tensors(self, prefix: str) -> list[Tensor]:
        """Tensors whose names start with ``prefix``, in file order."""
        return [self.tensor(key) for key in self.keys(prefix)]

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below ``prefix`` under their state-dict names."""
        return {key[len(prefix) :]: self.tensor(key) for key in self.keys(prefix)}

    def unread(self, *prefixes: str) -> list[str]:
        """Arrays below these prefixes, or of the whole file, that no test has read."""
        return [key for key in self.keys() if key.startswith(prefixes or "") and key not in self.read]

    def assert_checksums(
        self,
        group: str,
        tensors: dict[str, Tensor],
        rtol: float = 1e-4,
        atol: float = 1e-5,
        loose: dict[str, float] | None = None,
    ) -> None:
        """The named tensors are those of ``group``, by mean, standard deviation, norm and first four values of each.

        Args:
            loose: Other ``atol`` for the names in which a pattern is found.
        """
        names, expected = self[f"{group}/names"].tolist(), self[f"{group}/values"]
        assert set(names) == set(tensors), group
        for name, row in zip(names, expected, strict=True):
            values = tensors[name].detach().double().flatten()
            found = np.zeros(7)
            found[:3] = values.mean(), values.std(correction=0), values.norm()
            found[3 : 3 + len(values[:4])] = values[:4]
            own_atol = next((a for pattern, a in (loose or {}).items() if re.search(pattern, name)), atol)
            np.testing.assert_allclose(found, row, rtol=rtol, atol=own_atol, err_msg=f"{group}: {name}")


def batch_of(crops: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Views as a loader gives them, one tensor per size, with labels and indices that nothing depends on."""
    sides = dict.fromkeys(crop.shape[-1] for crop in crops)
    views = [torch.cat([crop for crop in crops if crop.shape[-1] == side]) for side in sides]
    return views, torch.zeros(len(crops[0])), torch.arange(len(crops[0]))
