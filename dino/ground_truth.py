"""Ground truth of the revisited Oxford and Paris benchmarks (Radenovic et al. 2018), read without running code."""

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shared.networks.weights import NumberType, UnsafeFileError, read_number


@dataclass
class GroundTruth:
    """Images of a benchmark and, for each query, the indices of its easy, hard and junk images in the database."""

    images: list[str]
    queries: list[str]
    relevance: list[dict[str, list[int]]]

    def without(self, images: Sequence[int], queries: Sequence[int]) -> "GroundTruth":
        """These images are junk for every query, and these queries have no positives."""
        relevance = [
            {"easy": [], "hard": [], "junk": []}
            if query in queries
            else {name: sorted({*lists[name]} - {*images}) for name in ("easy", "hard")}
            | {"junk": sorted({*lists["junk"], *images})}
            for query, lists in enumerate(self.relevance)
        ]
        return replace(self, relevance=relevance)


def read_ground_truth(folder: Path, dataset: str) -> GroundTruth:
    """Read ``gnd_<dataset>.pkl`` as published, or ``gnd_<dataset>.json`` with the same keys.

    The keys are ``imlist`` and ``qimlist``, file names without ``.jpg``, and ``gnd``, one dictionary per query with the
    lists ``easy``, ``hard`` and ``junk``.

    Raises:
        ValueError: If there is no such file, it holds anything but plain values and arrays of numbers, or an index is
            outside the database.
    """
    files = [folder / f"gnd_{dataset}.{suffix}" for suffix in ("pkl", "json")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"--data_path: neither {files[0]} nor {files[1].name} beside it exists")
    content = json.loads(file.read_text()) if file.suffix == ".json" else read_plain_pickle(file)
    try:
        images, queries = ([str(name) for name in content[key]] for key in ("imlist", "qimlist"))
        relevance = [{k: [int(i) for i in entry[k]] for k in ("easy", "hard", "junk")} for entry in content["gnd"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not the ground truth of a revisited benchmark: {error!r}") from error
    if len(relevance) != len(queries):
        raise ValueError(f"{file} has {len(queries)} queries and {len(relevance)} ground truths")
    for query, lists in zip(queries, relevance, strict=True):
        if any(not 0 <= i < len(images) for indices in lists.values() for i in indices):
            raise ValueError(f"{file}: an index of query {query} is outside the {len(images)} images")
    return GroundTruth(images, queries, relevance)


class PlainArray:
    """What ``numpy.ndarray`` becomes when read: its numbers, nothing else."""

    def __init__(self, *_):
        self.values = np.empty(0)

    def __setstate__(self, state: tuple):
        _, shape, number_type, column_major, data = state
        data = data.encode("latin1") if isinstance(data, str) else data  # written by Python 2
        values = np.frombuffer(data, np.dtype(number_type.byte_order + number_type.code))
        self.values = values.reshape(shape, order="F" if column_major else "C")

    def __iter__(self):
        return iter(self.values.tolist())


def encode_bytes(text: str, encoding: str) -> bytes:
    """What ``_codecs.encode`` becomes when read: how Python 3 writes bytes in protocols 0 to 2."""
    return text.encode("latin1")


PLAIN = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): PlainArray for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): read_number for core in ("core", "_core")},
    ("numpy", "ndarray"): PlainArray,
    ("numpy", "dtype"): NumberType,
    ("_codecs", "encode"): encode_bytes,
}


class PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings, numbers and numpy arrays of numbers; asks for nothing else."""

    def find_class(self, module: str, name: str):
        if (module, name) not in PLAIN:
            raise UnsafeFileError(f"it asks for {module}.{name}, which is neither a plain value nor an array")
        return PLAIN[module, name]

    def persistent_load(self, pid):
        raise UnsafeFileError("it refers to objects outside the file")


def read_plain_pickle(path: Path):
    """Content of a pickle of plain values; arrays come as iterables.

    Raises:
        UnsafeFileError: If the file holds anything else, or is damaged.
    """
    with open(path, "rb") as file:
        try:
            return PlainUnpickler(file, encoding="latin1").load()  # strings and arrays of Python 2
        except UnsafeFileError as error:
            raise UnsafeFileError(f"{path} is refused: {error}") from None
        except Exception as error:  # a forged pickle can raise anything from inside the reader
            raise UnsafeFileError(f"{path} is damaged or no pickle: {error!r}") from None
