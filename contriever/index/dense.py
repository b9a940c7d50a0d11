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
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import faiss
import numpy as np
import torch

from shared import distributed
from shared.evaluation.knn import nearest_neighbours

from ..text.files import read_json, replacing, write_json
from .answers import Answers, merge, nothing_found
from .embeddings import Shard

KINDS = ("scan", "flat", "ivf", "hnsw", "pq", "ivfpq")
QUERY_BLOCK = 2048
SCAN_BLOCK = 1 << 17  # vectors: 384 MiB in float32 when they are 768 long
POINTS_PER_CELL = 64  # vectors to train on, per centroid


def setting(default: int, minimum: int, meaning: str) -> int:
    """A field of :class:`IndexSettings` that is a flag, too."""
    return field(default=default, metadata={"minimum": minimum, "help": meaning})


@dataclass(frozen=True)
class IndexSettings:
    """What kind of index, one of ``KINDS``, and how much it may cost."""

    kind: str = "flat"
    n_subquantizers: int = setting(0, 0, "of pq and ivfpq; 0: one for eight dimensions")
    n_bits: int = setting(8, 1, "per subquantiser")
    nlist: int = setting(0, 0, "cells of ivf; 0: four times the square root of the number of passages")
    nprobe: int = setting(0, 0, "cells that are searched; 0: a sixteenth of them")
    hnsw_m: int = setting(32, 2, "neighbours per passage in the graph of hnsw")
    ef_construction: int = setting(200, 1, "candidates while hnsw is built")
    ef_search: int = setting(128, 1, "candidates while hnsw is searched")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "IndexSettings":
        """From the flags of :func:`add_index_flags`; as in the reference, subquantisers alone mean pq."""
        kind = args.index or ("pq" if args.n_subquantizers else "flat")
        if args.n_subquantizers and not kind.endswith("pq"):
            raise ValueError(f"--n_subquantizers {args.n_subquantizers} has no effect on --index {kind}")
        return cls(kind, *(getattr(args, flag.name) for flag in FLAGS))

    def factory(self, dim: int, count: int) -> str:
        """faiss' name of the index for ``count`` vectors of length ``dim``; ``ValueError`` if they do not fit."""
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

    def cells_searched(self, cells: int) -> int:
        """Of ``cells`` inverted lists."""
        return min(self.nprobe or max(1, cells // 16), cells)

    def training_size(self, count: int) -> int:
        """How many vectors centroids are learned from; 0 if there are none."""
        cells = self.cells(count) if self.kind.startswith("ivf") else 0
        codes = 2**self.n_bits if self.kind.endswith("pq") else 0
        return min(count, POINTS_PER_CELL * max(cells, 4 * codes))

    def what_was_built(self) -> dict:
        """The settings that cannot be changed once the index exists."""
        return {name: value for name, value in asdict(self).items() if name not in ("nprobe", "ef_search")}


FLAGS = fields(IndexSettings)[1:]
INDEX_MINIMUM = {"indexing_batch_size": 1} | {flag.name: flag.metadata["minimum"] for flag in FLAGS}


def add_index_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("index").add_argument
    add("--index", default=None, choices=KINDS, help="scan, flat: exact; None: flat, or pq with --n_subquantizers")
    for flag in FLAGS:
        add(f"--{flag.name}", type=int, default=flag.default, help=flag.metadata["help"])
    add("--indexing_batch_size", type=int, default=1_000_000, help="vectors added per call")


class DenseIndex:
    """An index over all shards; each process holds the parts of its shards, rank, rank + number of processes, ...

    Every process must construct it and call :meth:`search`.

    Args:
        shards: Of one collection; row numbers run through them.
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
            if self.settings.kind == "hnsw":
                self.parts[i].hnsw.efSearch = self.settings.ef_search
            if self.settings.kind.startswith("ivf"):
                cells = faiss.extract_index_ivf(self.parts[i])
                cells.nprobe = self.settings.cells_searched(cells.nlist)

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
                rows = np.linspace(0, len(self) - 1, size).astype(int)
                shard_of = np.searchsorted(self.starts, rows, side="right") - 1
                sample = [s.vectors[rows[shard_of == i] - self.starts[i]] for i, s in enumerate(self.shards)]
                trained.train(np.concatenate(sample).astype(np.float32))
                if file is not None:
                    _write(file, trained, made_from)
            serialized = faiss.serialize_index(trained)
        return faiss.deserialize_index(distributed.broadcast_object(serialized))

    def search(self, queries: np.ndarray, k: int) -> Answers:
        """The k vectors with the largest inner products with each query.

        Args:
            queries: float32, shape ``(Q, D)``, the same on every process.
        """
        dim = self.shards[0].vectors.shape[1]
        if queries.shape[1] != dim:
            raise ValueError(f"queries have {queries.shape[1]} dimensions, the index has {dim}: another model?")
        blocks = np.split(queries, range(QUERY_BLOCK, len(queries), QUERY_BLOCK))
        found = [self._search_block(np.ascontiguousarray(block, dtype=np.float32), k) for block in blocks]
        answers = tuple(np.concatenate(column) for column in zip(*found, strict=True))
        if distributed.get_world_size() > 1:
            answers = merge(distributed.all_gather_object(answers), k)
        self._tell_too_few(answers[1])
        return answers

    def _tell_too_few(self, rows: np.ndarray) -> None:
        """Say so where fewer vectors were found than there are: an approximate index looks at a part of them only."""
        counts, wanted = (rows >= 0).sum(axis=1), min(rows.shape[1], len(self))
        if (too_few := int((counts < wanted).sum())) == 0:
            return
        flag, value = "ef_search", self.settings.ef_search
        if self.settings.kind.startswith("ivf"):
            flag, value = "nprobe", self.settings.cells_searched(self.settings.cells(len(self)))
        distributed.print_once(
            f"NOTE: {too_few} of {len(rows)} queries found fewer than {wanted} passages, one of them {counts.min()}: "
            f"raise --{flag}, now {value}"
        )

    def _search_block(self, queries: np.ndarray, k: int) -> Answers:
        best = nothing_found(len(queries), k)
        for i in self._own():
            answers = self._scan(i, queries, k) if self.settings.kind == "scan" else [self.parts[i].search(queries, k)]
            for scores, rows in answers:
                found = np.where(rows < 0, np.float32(-np.inf), scores), np.where(rows < 0, -1, rows + self.starts[i])
                best = merge([found, best], k)
        return best

    def _scan(self, i: int, queries: np.ndarray, k: int) -> Iterator[Answers]:
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


def _filled(empty: faiss.Index, vectors: np.ndarray, batch_size: int) -> faiss.Index:
    part = faiss.clone_index(empty)
    for start in range(0, len(vectors), batch_size):
        part.add(np.ascontiguousarray(vectors[start : start + batch_size], dtype=np.float32))
    return part


# --- Files ------------------------------------------------------------------------------------------------------------


def _write(file: Path, index: faiss.Index, made_from: dict) -> None:
    try:
        with replacing(file, "wb") as temporary:
            faiss.write_index(index, temporary.name)
    except RuntimeError as error:
        raise OSError(f"could not write {file}: {error}") from None
    write_json(file.with_suffix(".json"), made_from | {"size": file.stat().st_size})


def _read(file: Path, made_from: dict) -> faiss.Index | None:
    """A stored index, memory-mapped; None, with a reason printed, when it has to be built (again)."""
    found = read_json(file.with_suffix(".json"), {})
    if not found:
        return None
    size = found.pop("size")
    if found != made_from:
        print(f"{file} belongs to other embeddings or settings: it is built again", flush=True)
    elif not file.exists() or file.stat().st_size != size:
        print(f"{file} is half-written: it is built again", flush=True)
    else:
        return faiss.read_index(str(file), getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP))
    return None


def _crc(shard: Shard) -> list[int]:
    """A checksum of the vectors; files of the reference come without one."""
    return list(shard.crc or (zlib.crc32(np.ascontiguousarray(shard.vectors)), len(shard.ids)))
