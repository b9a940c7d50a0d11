"""Maximum inner product search over shards of vectors, exact or approximate, with faiss.

Each shard becomes one part of the index. Parts are built, stored, memory-mapped and searched one by one, and shared out
over the processes; the answers of all parts are merged.

    scan    exact, straight from the files, block by block, on the GPU if there is one; nothing is built
    flat    exact, float32 in memory                                   4 D bytes per vector
    ivf     inverted lists (k-means cells), float16                    2 D + 8
    hnsw    a graph of neighbours, float16                             2 D + about 8.6 M
    pq      product quantisation                                       n_subquantizers * n_bits / 8
    ivfpq   product quantisation in inverted lists                     the same + 8
"""

import argparse
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np
import torch

from shared import distributed
from shared.evaluation.knn import nearest_neighbours

from .embeddings import Shard, read_json, write_json

KINDS = ("scan", "flat", "ivf", "hnsw", "pq", "ivfpq")
QUERY_BLOCK = 2048
SCAN_BLOCK = 1 << 17  # vectors: 384 MiB in float32 when they are 768 long
POINTS_PER_CELL = 64  # vectors to train on, per centroid
INDEX_MINIMUM = {  # of the flags
    "indexing_batch_size": 1,
    "n_subquantizers": 0,
    "n_bits": 1,
    "nlist": 0,
    "nprobe": 0,
    "hnsw_m": 2,
    "ef_construction": 1,
    "ef_search": 1,
}


@dataclass(frozen=True)
class IndexSettings:
    """What kind of index, and how much it may cost.

    Attributes:
        kind: One of ``KINDS``.
        n_subquantizers: Bytes (with 8 bits) per vector of pq and ivfpq; 0: one for eight dimensions.
        n_bits: Bits per subquantiser.
        nlist: Cells of ivf; 0: four times the square root of the number of vectors.
        nprobe: Cells that are searched; 0: a sixteenth of them.
        hnsw_m: Neighbours per vector in the graph.
        ef_construction, ef_search: Candidates that are kept while the graph is built and searched.
    """

    kind: str = "flat"
    n_subquantizers: int = 0
    n_bits: int = 8
    nlist: int = 0
    nprobe: int = 0
    hnsw_m: int = 32
    ef_construction: int = 200
    ef_search: int = 128

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "IndexSettings":
        """From the flags of :func:`add_index_flags`; as in the reference, subquantisers alone mean pq."""
        kind = args.index or ("pq" if args.n_subquantizers else "flat")
        if args.n_subquantizers and not kind.endswith("pq"):
            raise ValueError(f"--n_subquantizers {args.n_subquantizers} has no effect on --index {kind}")
        return cls(kind, *(getattr(args, name) for name in list(cls.__dataclass_fields__)[1:]))

    def factory(self, dim: int, count: int) -> str:
        """faiss' name of the index for ``count`` vectors of length ``dim``.

        Raises:
            ValueError: If the settings do not fit the vectors.
        """
        if self.kind == "hnsw":
            return f"HNSW{self.hnsw_m},SQfp16"
        lists = f"IVF{self.cells(count)}," if self.kind.startswith("ivf") else ""
        if not self.kind.endswith("pq"):
            return lists + ("SQfp16" if lists else "Flat")
        m = self.n_subquantizers or max(1, dim // 8)
        if dim % m:
            raise ValueError(f"--n_subquantizers {m} does not divide the {dim} dimensions of the vectors")
        if count < 2**self.n_bits:
            raise ValueError(f"--n_bits {self.n_bits} needs at least {2**self.n_bits} passages, there are {count}")
        return f"{lists}PQ{m}x{self.n_bits}"

    def cells(self, count: int) -> int:
        """Number of inverted lists for ``count`` vectors."""
        cells = self.nlist or max(1, round(4 * count**0.5))
        if cells > count:
            raise ValueError(f"--nlist {cells} is more than the {count} passages")
        return cells

    def training_size(self, count: int) -> int:
        """How many vectors centroids are learned from; 0 if there are none."""
        cells = self.cells(count) if self.kind.startswith("ivf") else 0
        codes = 2**self.n_bits if self.kind.endswith("pq") else 0
        return min(count, POINTS_PER_CELL * max(cells, 4 * codes))

    def what_was_built(self) -> dict:
        """The settings that cannot be changed once the index exists."""
        return {name: value for name, value in asdict(self).items() if name not in ("nprobe", "ef_search")}


def add_index_flags(parser: argparse.ArgumentParser) -> None:
    default = IndexSettings()
    add = parser.add_argument_group("index").add_argument
    add("--index", default=None, choices=KINDS, help="scan, flat: exact; None: flat, or pq with --n_subquantizers")
    add("--n_subquantizers", type=int, default=0, help="of pq and ivfpq; 0: one for eight dimensions")
    add("--n_bits", type=int, default=default.n_bits, help="per subquantiser")
    add("--nlist", type=int, default=0, help="cells of ivf; 0: four times the square root of the number of passages")
    add("--nprobe", type=int, default=0, help="cells that are searched; 0: a sixteenth of them")
    add("--hnsw_m", type=int, default=default.hnsw_m, help="neighbours per passage in the graph of hnsw")
    add("--ef_construction", type=int, default=default.ef_construction, help="candidates while hnsw is built")
    add("--ef_search", type=int, default=default.ef_search, help="candidates while hnsw is searched")
    add("--indexing_batch_size", type=int, default=1_000_000, help="vectors added per call")


class DenseIndex:
    """An index over all shards; each process holds the parts of its shards, rank, rank + number of processes, ...

    Every process must construct it and call :meth:`search`.

    Args:
        shards: Of one collection; row numbers run through them.
        settings: The kind of index.
        folder: Where the parts are stored, and read again when they belong to the same vectors and settings; None: in
            memory only.
        batch_size: Vectors added per call.
        device: For ``scan``.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        settings: IndexSettings,
        folder: Path | None = None,
        batch_size: int = 1_000_000,
        device: torch.device | str = "cpu",
    ):
        self.shards, self.settings, self.device = shards, settings, device
        self.starts = np.cumsum([0, *(len(shard.vectors) for shard in shards)])
        self.parts = {}
        if settings.kind != "scan":
            self._build(folder, batch_size)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _own(self) -> Iterator[int]:
        return iter(range(distributed.get_rank(), len(self.shards), distributed.get_world_size()))

    def _build(self, folder: Path | None, batch_size: int) -> None:
        dim = self.shards[0].vectors.shape[1]
        empty = faiss.index_factory(dim, self.settings.factory(dim, len(self)), faiss.METRIC_INNER_PRODUCT)
        if self.settings.kind == "hnsw":
            empty.hnsw.efConstruction = self.settings.ef_construction
        built = self.settings.what_was_built()
        if folder is not None and distributed.is_main_process():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "index.json", built)
        distributed.barrier()
        if training_size := self.settings.training_size(len(self)):
            crcs = [_crc(shard) for shard in self.shards]
            empty = self._trained(empty, training_size, folder, built | {"shards": crcs})
        for i in self._own():
            shard = self.shards[i]
            made_from = built | {"shard": _crc(shard), "trained": zlib.crc32(faiss.serialize_index(empty))}
            file = None if folder is None else folder / f"{shard.path.name}.faiss"
            self.parts[i] = file and _read(file, made_from)
            if self.parts[i] is None:
                shard.verify()
                self.parts[i] = _filled(empty, shard.vectors, batch_size)
                if file is not None:
                    _write(file, self.parts[i], made_from)
                    self.parts[i] = _read(file, made_from)  # memory-mapped
            self._set_effort(self.parts[i])

    def _trained(self, empty: faiss.Index, size: int, folder: Path | None, made_from: dict) -> faiss.Index:
        """The index with its centroids, learned on rank 0 from vectors spread evenly over all shards."""
        serialized = None
        if distributed.is_main_process():
            file = None if folder is None else folder / "trained.faiss"
            trained = file and _read(file, made_from)
            if trained is None:
                trained = empty
                for part in (trained, getattr(trained, "pq", None)):
                    if hasattr(part, "cp"):
                        part.cp.min_points_per_centroid = 1  # few passages: no warning for every subquantiser
                trained.train(self._sample(size))
                if file is not None:
                    _write(file, trained, made_from)
            serialized = faiss.serialize_index(trained)
        return faiss.deserialize_index(distributed.broadcast_object(serialized))

    def _sample(self, size: int) -> np.ndarray:
        rows = np.linspace(0, len(self) - 1, size).astype(int)
        shard_of = np.searchsorted(self.starts, rows, side="right") - 1
        parts = [s.vectors[rows[shard_of == i] - self.starts[i]] for i, s in enumerate(self.shards)]
        return np.concatenate(parts).astype(np.float32)

    def _set_effort(self, part: faiss.Index) -> None:
        if self.settings.kind == "hnsw":
            part.hnsw.efSearch = self.settings.ef_search
        if self.settings.kind.startswith("ivf"):
            cells = faiss.extract_index_ivf(part)
            cells.nprobe = min(self.settings.nprobe or max(1, cells.nlist // 16), cells.nlist)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k vectors with the largest inner products.

        Args:
            queries: float32, shape ``(Q, D)``, the same on every process.

        Returns:
            Inner products (Q, k) float32, best first, and row numbers (Q, k) int64; -inf and -1 where nothing was
            found, as with fewer than k vectors.

        Raises:
            ValueError: If the queries are vectors of another length.
        """
        dim = self.shards[0].vectors.shape[1]
        if queries.shape[1] != dim:
            raise ValueError(f"queries have {queries.shape[1]} dimensions, the index has {dim}: another model?")
        blocks = np.split(queries, range(QUERY_BLOCK, len(queries), QUERY_BLOCK))
        found = [self._search_block(np.ascontiguousarray(block, dtype=np.float32), k) for block in blocks]
        scores, rows = (np.concatenate(column) for column in zip(*found, strict=True))
        if distributed.get_world_size() > 1:
            scores, rows = merge(distributed.all_gather_object((scores, rows)), k)
        return scores, rows

    def _search_block(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        nothing = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        best = None
        for i in self._own():
            answers = self._scan(i, queries, k) if self.settings.kind == "scan" else [self.parts[i].search(queries, k)]
            for scores, rows in answers:
                found = np.where(rows < 0, np.float32(-np.inf), scores), np.where(rows < 0, -1, rows + self.starts[i])
                best = found if best is None else merge([best, found], k)
        return nothing if best is None else best if best[0].shape[1] == k else merge([best, nothing], k)

    def _scan(self, i: int, queries: np.ndarray, k: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        vectors = self.shards[i].vectors
        on_device = torch.from_numpy(queries).to(self.device)
        for start in range(0, len(vectors), SCAN_BLOCK):
            block = torch.from_numpy(np.array(vectors[start : start + SCAN_BLOCK])).to(self.device).float()
            scores, rows = nearest_neighbours(on_device, block, min(k, len(block)))
            yield scores.cpu().numpy(), rows.cpu().numpy() + start

    def id(self, row: int) -> str:
        """The passage id of a row number."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.shards[shard].ids[row - int(self.starts[shard])]


def merge(answers: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best k of several answers to the same queries; equal scores in the order of their rows.

    Args:
        answers: (scores, rows), arrays (Q, any), as :meth:`DenseIndex.search` returns them.
    """
    scores, rows = (np.concatenate(column, axis=1) for column in zip(*answers, strict=True))
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _filled(empty: faiss.Index, vectors: np.ndarray, batch_size: int) -> faiss.Index:
    part = faiss.clone_index(empty)
    for start in range(0, len(vectors), batch_size):
        part.add(np.ascontiguousarray(vectors[start : start + batch_size], dtype=np.float32))
    return part


# --- Files ------------------------------------------------------------------------------------------------------------


def _write(file: Path, index: faiss.Index, made_from: dict) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        faiss.write_index(index, str(temporary))
    except RuntimeError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {file}: {error}") from None
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    size = temporary.stat().st_size
    os.replace(temporary, file)
    write_json(_description(file), made_from | {"size": size})


def _read(file: Path, made_from: dict) -> faiss.Index | None:
    """A stored index, memory-mapped; None, with a reason printed, when it has to be built (again)."""
    description = _description(file)
    if not description.exists():
        return None
    found = read_json(description)
    size = found.pop("size")
    if found != made_from:
        print(f"{file} belongs to other embeddings or settings: it is built again", flush=True)
    elif not file.exists() or file.stat().st_size != size:
        print(f"{file} is half-written: it is built again", flush=True)
    else:
        return faiss.read_index(str(file), getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP))
    return None


def _description(file: Path) -> Path:
    return file.with_suffix(".json")


def _crc(shard: Shard) -> list[int]:
    """A checksum of the vectors; files of the reference come without one."""
    return list(shard.crc or (zlib.crc32(np.ascontiguousarray(shard.vectors)), len(shard.ids)))
