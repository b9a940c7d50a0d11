"""Vectors of passages on disk: one folder per shard, memory-mapped, written so that a kill loses at most one chunk.

    passages_00/
        embeddings.npy   float16 or float32, shape (N, D), in the order of the passages
        ids.txt          N lines
        shard.json       written last: model, settings, number of passages, checksums

While a shard is being written, ``progress.json`` stands in the place of ``shard.json``.
"""

import errno
import fcntl
import glob
import os
import pickle
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shared.networks.weights import NumberType

from ..text.files import first_difference, read_json, write_json

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what Lustre and some NFS say
BLOCK_BYTES = 1 << 26  # of a file of ids that are searched for line breaks at once


class ShardWriter:
    """Appends chunks of passages to a shard; a shard that an earlier process left unfinished is continued.

    Args:
        count: Passages of the finished shard.
        dtype: ``float16`` or ``float32``.
        settings: Whatever the vectors depend on, plain values. A shard can only be continued with equal ones.

    Attributes:
        done: Passages on disk.

    Raises:
        ValueError: If the folder holds a shard, finished or not, that was made with other settings.
    """

    def __init__(self, folder: Path, count: int, dim: int, dtype: str, settings: dict):
        self.folder = folder
        self.description = {"count": count, "dim": dim, "dtype": dtype, "settings": settings}
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(folder / "lock", "w")  # noqa: SIM115 - held until the writer is gone
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {folder}") from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            print(f"{folder}: this file system knows no locks; see that no other process writes the shard", flush=True)
        self.finished = (folder / "shard.json").exists()
        nothing = self.description | {"done": 0, "crc": [0, 0], "ids_bytes": 0}
        found = read_json(folder / ("shard.json" if self.finished else "progress.json"), nothing)
        self._refuse_other_settings(found)
        self.done, self._crc, self._ids_bytes = found["done"], found["crc"], found["ids_bytes"]
        if self.finished:
            self.close()
        else:
            self._cut_back()

    def _refuse_other_settings(self, found: dict) -> None:
        sizes = ("count", "dim", "dtype")
        old, new = (d["settings"] | {key: d[key] for key in sizes} for d in (found, self.description))
        if key := first_difference(new, old):
            raise ValueError(
                f"{self.folder} was made with other settings: {key} was {old.get(key)!r} and is {new.get(key)!r}; "
                "choose another --output_dir or --prefix, or remove the folder"
            )

    def _cut_back(self) -> None:
        """Remove what was written after the last record of progress."""
        vectors, ids = self.folder / "embeddings.npy", self.folder / "ids.txt"
        number, shape = np.dtype(self.description["dtype"]), (self.description["count"], self.description["dim"])
        header = {"descr": number.str, "fortran_order": False, "shape": shape}
        with open(vectors, "r+b" if vectors.exists() else "w+b") as file:
            np.lib.format.write_array_header_1_0(file, header)
            _truncate(file, file.tell() + self.done * shape[1] * number.itemsize)
        with open(ids, "r+b" if ids.exists() else "w+b") as file:
            _truncate(file, self._ids_bytes)

    def append(self, ids: list[str], vectors: np.ndarray) -> None:
        """Add passages, and record it once they are on the disk.

        Raises:
            ValueError: If a vector is not finite in the shard's number format, or an id contains a line break.
        """
        stored = vectors.astype(self.description["dtype"])
        bad = np.flatnonzero(~np.isfinite(stored).all(axis=1))
        if len(bad):
            raise ValueError(
                f"the vector of passage {ids[bad[0]]!r} is not finite in {self.description['dtype']}: the largest "
                f"value is {np.abs(vectors[bad[0]]).max()}; --no_fp16 stores float32"
            )
        broken = next((i for i in ids if "\n" in i), None)
        if broken is not None:
            raise ValueError(f"the passage id {broken!r} contains a line break")
        lines = "".join(f"{i}\n" for i in ids).encode()
        for i, (name, data) in enumerate((("embeddings.npy", stored.tobytes()), ("ids.txt", lines))):
            with open(self.folder / name, "ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._crc[i] = zlib.crc32(data, self._crc[i])
        self._ids_bytes += len(lines)
        self.done += len(ids)
        self._record("progress.json")

    def _record(self, name: str) -> None:
        state = {"done": self.done, "crc": self._crc, "ids_bytes": self._ids_bytes}
        write_json(self.folder / name, self.description | state)

    def finish(self) -> None:
        """Mark the shard as complete."""
        assert self.done == self.description["count"]
        self._record("shard.json")
        (self.folder / "progress.json").unlink(missing_ok=True)
        self.finished = True
        self.close()

    def close(self) -> None:
        """Let other processes write the shard."""
        (self.folder / "lock").unlink(missing_ok=True)
        self._lock.close()


def _truncate(file: BinaryIO, size: int) -> None:
    file.flush()
    if os.fstat(file.fileno()).st_size < size:
        raise ValueError(f"{file.name} is shorter than progress.json says: remove its folder and make the shard again")
    file.truncate(size)


class Ids:
    """Lines of a text file, memory-mapped: only their places are kept in memory, 8 bytes each."""

    def __init__(self, path: Path):
        self._bytes = np.memmap(path, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        blocks = range(0, len(self._bytes), BLOCK_BYTES)
        ends = [np.flatnonzero(self._bytes[start : start + BLOCK_BYTES] == ord("\n")) + start for start in blocks]
        self._ends = np.concatenate([[-1], *ends])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str:
        return bytes(self._bytes[self._ends[row] + 1 : self._ends[row + 1]]).decode()


@dataclass(frozen=True)
class Shard:
    """Vectors (N, D) of consecutive passages, memory-mapped.

    Files of the reference's format have no settings and no checksums (of vectors and of ids).
    """

    path: Path
    vectors: np.ndarray
    ids: Ids | list[str]
    settings: dict
    crc: tuple[int, int] | None

    def verify(self) -> None:
        """Raise ``ValueError`` if the vectors were damaged after they were written."""
        if self.crc is not None and zlib.crc32(np.ascontiguousarray(self.vectors)) != self.crc[0]:
            raise ValueError(f"{self.path / 'embeddings.npy'} is damaged: its checksum is not that of shard.json")


def open_shard(path: Path) -> Shard:
    """A finished shard."""
    if path.is_file():
        return Shard(path, *read_official_shard(path), {}, None)
    if not (path / "shard.json").exists():
        if (path / "progress.json").exists():
            progress = read_json(path / "progress.json")
            raise ValueError(
                f"{path} is half-written ({progress['done']} of {progress['count']} passages): run "
                "generate_passage_embeddings.py with the same flags again to finish it"
            )
        raise ValueError(f"{path} holds no embeddings of generate_passage_embeddings.py")
    record = read_json(path / "shard.json")
    try:
        vectors = np.load(path / "embeddings.npy", mmap_mode="r", allow_pickle=False)
        ids = Ids(path / "ids.txt")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if vectors.shape != (record["count"], record["dim"]) or len(ids) != record["count"]:
        raise ValueError(
            f"{path} is damaged: {record['count']} passages of {record['dim']} numbers expected, found vectors of "
            f"shape {vectors.shape} and {len(ids)} ids"
        )
    return Shard(path, vectors, ids, record["settings"], tuple(record["crc"]))


def open_shards(pattern: str) -> list[Shard]:
    """The finished shards of one collection that match a glob pattern, in the order of their names.

    Folders of indexes are passed over.
    """
    paths = [Path(p) for p in sorted(glob.glob(pattern)) if not (Path(p) / "index.json").exists()]
    if not paths:
        raise ValueError(f"--passages_embeddings {pattern}: nothing there")
    shards = [open_shard(path) for path in paths]
    by_number = {}
    first, *rest = (
        shard.settings | {"length of vectors": shard.vectors.shape[1], "shard_id": None} for shard in shards
    )
    for shard, settings in zip(shards[1:], rest, strict=True):
        if what := first_difference(first, settings):
            raise ValueError(
                f"{shards[0].path} and {shard.path} do not belong together: {what} is {first.get(what)!r} and "
                f"{settings.get(what)!r}"
            )
    for shard in shards:
        number = shard.settings.get("shard_id", shard.path)
        if number in by_number:
            raise ValueError(f"{by_number[number]} and {shard.path} are the same part {number} of the collection")
        by_number[number] = shard.path
    return shards


def missing_shards(shards: Iterable[Shard]) -> list[int]:
    """Numbers of the shards of the same collection that are not among ``shards``."""
    numbers = {shard.settings.get("shard_id") for shard in shards}
    counts = {shard.settings.get("num_shards") for shard in shards} - {None}
    return [i for i in range(max(counts, default=0)) if i not in numbers]


# --- The reference's files: a pickled pair of ids and array -----------------------------------------------------------


class _Array:
    """Stands for ``numpy.ndarray`` in a pickle: a matrix from its bytes."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: tuple):
        _, shape, number, fortran_order, data = state
        vectors = np.frombuffer(data, number.byte_order + number.code)
        self.matrix = vectors.reshape(shape, order="F" if fortran_order else "C")


class _Reader(pickle.Unpickler):
    """Reads lists of strings and one matrix; numpy's own constructors are never called."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("numpy", "dtype"):
            return NumberType
        if name in ("ndarray", "_reconstruct") and module.split(".")[0] == "numpy":
            return _Array
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_official_shard(path: Path) -> tuple[np.ndarray, list[str]]:
    """Vectors (N, D) and ids of a file of the reference, without running code from it."""
    with open(path, "rb") as file:
        try:
            ids, array = _Reader(file).load()
            vectors = array.matrix
            valid = vectors.ndim == 2 and len(ids) == len(vectors) and all(isinstance(i, str) for i in ids)
            valid = valid and vectors.dtype in (np.float16, np.float32)
        except Exception as error:  # a forged pickle can raise anything from inside the reader
            raise ValueError(f"{path} is no file of embeddings: {error}") from None
    if not valid:
        raise ValueError(f"{path} does not hold a vector in 16 or 32 bits for every id")
    return vectors, ids
