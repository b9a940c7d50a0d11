"""Reading, without running code from it, what ``torch.save`` wrote before torch 0.1.10: a tar archive.

Torch reads such files only when it may run code from them. The archive holds ``storages`` (for each: a pickled (key,
device, type), the number of elements in 8 bytes, the elements), ``tensors`` (for each: a pickled (key, key of the
storage, type), then dimensions, sizes, strides and offset), and ``pickle``, the saved value, which refers to tensors by
their keys.
"""

import io
import math
import pickle
import re
import struct
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

MEMBERS = ("storages", "tensors", "pickle")
DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
}


def is_legacy_tar(path: str | Path) -> bool:
    """Whether a file is a tar archive, by its content."""
    with open(path, "rb") as file:
        return file.read(262)[257:] == b"ustar"


def read_legacy_tar(path: str | Path, map_location: str | torch.device = "cpu"):
    """The saved value. Besides tensors there may be plain containers and values.

    Raises:
        pickle.UnpicklingError: If the file asks for anything else.
        ValueError, KeyError, EOFError, tarfile.TarError: If it is damaged.
    """
    with tarfile.open(path, "r:") as archive:
        members = {name: archive.getmember(name) for name in MEMBERS}
        if not all(member.isreg() and not member.issparse() for member in members.values()):
            raise ValueError("the archive holds something else than plain files")
        storages = _read_storages(io.BytesIO(archive.extractfile(members["storages"]).read()))
        tensors = _read_tensors(io.BytesIO(archive.extractfile(members["tensors"]).read()), storages)
        tensors = {key: tensor.to(map_location) for key, tensor in tensors.items()}
        return _PlainUnpickler(archive.extractfile(members["pickle"]), tensors).load()


class _PlainUnpickler(pickle.Unpickler):
    """Plain containers and values, types of numbers, and tensors that have been read before.

    Args:
        tensors: By key.
    """

    def __init__(self, file: BinaryIO, tensors: dict[int, Tensor] | None = None):
        super().__init__(file, encoding="latin1")  # strings of Python 2
        self.tensors = tensors or {}

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        number = re.fullmatch(r"(\w+)(Storage|Tensor)", name)
        if module in ("torch", "torch.cuda") and number and number[1] in DTYPES:
            return DTYPES[number[1]]
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

    def persistent_load(self, key):
        return self.tensors[int(key)]


def _read_storages(file: BinaryIO) -> dict[int, Tensor]:
    """One-dimensional tensors, by key."""
    storages = {}
    for _ in range(_PlainUnpickler(file).load()):
        key, _, dtype = _PlainUnpickler(file).load()
        (elements,) = struct.unpack("<q", _exactly(file, 8))
        data = _exactly(file, elements * dtype.itemsize)
        storages[key] = torch.frombuffer(bytearray(data), dtype=dtype) if elements else torch.empty(0, dtype=dtype)
    for key, root, offset, elements in _PlainUnpickler(file).load():
        storages[key] = storages[root].as_strided((elements,), (1,), offset)
    return storages


def _read_tensors(file: BinaryIO, storages: dict[int, Tensor]) -> dict[int, Tensor]:
    tensors = {}
    for _ in range(_PlainUnpickler(file).load()):
        key, storage, _ = _PlainUnpickler(file).load()
        dimensions, _ = struct.unpack("<ii", _exactly(file, 8))
        *layout, offset = struct.unpack(f"<{2 * dimensions + 1}q", _exactly(file, 8 * (2 * dimensions + 1)))
        size, stride = layout[:dimensions], layout[dimensions:]
        view = storages[storage]
        if math.prod(size) > view.numel():  # strides of 0 make much out of little
            raise ValueError(f"a tensor of {size} in a storage of {view.numel()} elements")
        # an offset into a view is one into its memory; torch refuses what lies outside
        tensors[key] = view.as_strided(size, stride, view.storage_offset() + offset)
    return tensors


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count) if count >= 0 else b""
    if len(data) != count:
        raise EOFError(f"{count} bytes expected, {len(data)} found")
    return data
