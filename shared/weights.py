"""Reading weights: without running code from the file, whatever layout they were saved in, and never by half."""

import argparse
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch


class UnsafeFileError(ValueError):
    """A weight file asks for more than tensors and plain values, or is damaged; nothing in it has been run."""


# --- Safe reading -----------------------------------------------------------------------------------------------------


class NumberType:
    """What ``numpy.dtype`` becomes when read: the code of one number type and its byte order, nothing else."""

    def __init__(self, code: str, align: bool = False, copy: bool = True):
        if not re.fullmatch(r"[fiu][1248]|b1", code):
            raise UnsafeFileError(f"numpy type {code!r} is not a number")
        self.code = code
        self.byte_order = "="

    def __setstate__(self, state: tuple):
        if state[1] not in ("<", ">", "|", "="):
            raise UnsafeFileError(f"byte order {state[1]!r}")
        self.byte_order = state[1]


def read_number(number_type: NumberType, data: bytes) -> float | int | bool:
    """What ``numpy.*.scalar`` becomes when read: a Python number."""
    return np.frombuffer(data, np.dtype(number_type.byte_order + number_type.code), count=1)[0].item()


# Checkpoints of published runs hold the parsed flags, and learning rates as numpy scalars. Numpy's own constructors are
# never called: a forged dtype can make them read foreign memory as objects.
SAFE_GLOBALS = [
    argparse.Namespace,
    (NumberType, "numpy.dtype"),
    (read_number, "numpy.core.multiarray.scalar"),
    (read_number, "numpy._core.multiarray.scalar"),
]


def safe_load(path: str | Path, map_location: str | torch.device = "cpu"):
    """Read a file of ``torch.save`` (both formats) or safetensors, recognised by content, without running code.

    Besides tensors and plain containers, ``argparse.Namespace`` and numpy numbers are read, the latter as Python
    numbers.

    Raises:
        UnsafeFileError: If the file holds anything else, or is damaged.
        OSError: If it cannot be opened.
    """
    path = Path(path)
    with open(path, "rb") as file:
        start = file.read(9)
    try:
        if start[8:] == b"{":
            return safetensors.torch.load_file(path, device=str(map_location))
        if start.startswith(b"PK"):
            _refuse_expanding_archive(path)
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of files that are refused anyway
            return torch.load(path, map_location=map_location, weights_only=True)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path} is refused: {error}") from None
    except Exception as error:  # a forged pickle can raise anything from inside the reader
        asks_for = re.search(r"GLOBAL (\S+)", str(error))
        if asks_for:
            message = f"{path} is refused: it asks for {asks_for[1]}, which is neither a tensor nor a plain value"
        else:
            reason = str(error).split("\n")[-1] if isinstance(error, safetensors.SafetensorError) else _reason(error)
            message = f"{path} is damaged or no file of torch.save or safetensors: {reason}"
        raise UnsafeFileError(message) from None


def _reason(error: Exception) -> str:
    text = str(error).split("WeightsUnpickler error: ")[-1].strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def _refuse_expanding_archive(path: Path) -> None:
    """``torch.save`` never compresses, so that records larger than their file are a decompression bomb."""
    with zipfile.ZipFile(path) as archive:
        size = sum(record.file_size for record in archive.infolist())
    if size > path.stat().st_size:
        raise UnsafeFileError(f"its {path.stat().st_size} bytes expand to {size}")
