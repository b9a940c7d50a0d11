"""Indexing and searching vectors: beside bare faiss, and as their number grows.

    python tests/benchmarks/bench_retrieval.py [--max_vectors 100000] [--threads 2] [--out FILE.json]

- ``overhead``: building and searching a flat index from files of float16 vectors, beside bare faiss on the same vectors
  in memory. Target: search within 5 %.
- ``growth``: every kind of index from 10 thousand vectors up to ``--max_vectors`` (up to 10 million: ``--max_vectors
  10000000`` takes 60 GB of disk and hours): seconds to build, milliseconds per query, recall of the exact 10 nearest,
  bytes per vector; and what 10 billion would take, by the bytes per vector.

Embedding is measured by ``bench_contriever.py``.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import faiss
import numpy as np
import torch
import torch.nn.functional as F

import shared.run.passive_threads  # noqa: F401
from contriever.index.dense import DenseIndex, IndexSettings
from contriever.index.embeddings import Shard, ShardWriter, open_shard
from tests.benchmarks.harness import alternate, clustered_features, compare, finish, get_args_parser

DIM = 384
K = 10
GROWTH = ("scan", "flat", "ivf", "hnsw", "pq", "ivfpq")


def generated_vectors(count: int, seed: int) -> np.ndarray:
    """Unit vectors, float16."""
    return F.normalize(clustered_features(count, DIM, seed), dim=1).numpy().astype(np.float16)


def write_vectors(folder: Path, count: int) -> Shard:
    writer = ShardWriter(folder, count, DIM, "float16", {})
    for start in range(0, count, 100_000):
        size = min(100_000, count - start)
        writer.append([str(i) for i in range(start, start + size)], generated_vectors(size, seed=1 + start))
    writer.finish()
    return open_shard(folder)


def bench_overhead(folder: Path, count: int, queries: np.ndarray, rounds: int) -> dict:
    shard = write_vectors(folder / f"overhead_{count}", count)
    vectors = shard.vectors.astype(np.float32)

    def build_bare() -> faiss.Index:
        index = faiss.IndexFlatIP(DIM)
        index.add(vectors)
        return index

    bare, ours = build_bare(), DenseIndex([shard], IndexSettings("flat"))
    (scores, rows), (their_scores, their_rows) = ours.search(queries, 100), bare.search(queries, 100)
    in_order = np.lexsort((their_rows, -their_scores))  # rows of equal scores in ascending order, as ours are
    assert np.array_equal(scores, their_scores)
    assert np.array_equal(rows[:, :-1], np.take_along_axis(their_rows, in_order, axis=1)[:, :-1])
    result = {}
    for what, ways in {
        "build": {"faiss": build_bare, "ours": lambda: DenseIndex([shard], IndexSettings("flat"))},
        "search": {"faiss": lambda: bare.search(queries, 100), "ours": lambda: ours.search(queries, 100)},
    }.items():
        print(f"{what} of {count} vectors")
        result[what] = compare(alternate(ways, rounds), "faiss")
    print("(building from files converts float16 and compares a checksum; bare faiss has float32 in memory)")
    return result


def bytes_on_disk(kind: str, shard: Shard, folder: Path) -> int:
    return shard.vectors.nbytes if kind == "scan" else sum(file.stat().st_size for file in folder.glob("*.faiss"))


def bench_growth(folder: Path, sizes: list[int], queries: np.ndarray) -> dict:
    result = {}
    print(f"\n{'vectors':>9} {'index':6} {'build s':>8} {'ms/query':>9} {'recall@10':>9} {'bytes/vector':>12}")
    for count in sizes:
        shard = write_vectors(folder / f"growth_{count}", count)
        exact = DenseIndex([shard], IndexSettings("scan")).search(queries, K)[1]
        for kind in GROWTH:
            stored = folder / f"index-{kind}-{count}"
            start = time.perf_counter()
            index = DenseIndex([shard], IndexSettings(kind), stored)
            build = time.perf_counter() - start
            start = time.perf_counter()
            rows = index.search(queries, K)[1]
            search = (time.perf_counter() - start) / len(queries)
            recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(rows.tolist(), exact.tolist(), strict=True)])
            per_vector = bytes_on_disk(kind, shard, stored) / count
            result.setdefault(kind, []).append(
                {"vectors": count, "build_s": build, "query_s": search, "recall": recall, "bytes": per_vector}
            )
            print(f"{count:9} {kind:6} {build:8.2f} {1000 * search:9.3f} {recall:9.3f} {per_vector:12.1f}", flush=True)
    print("\nmegabytes per million vectors, and terabytes for 10 billion, by the bytes per vector of the largest size:")
    for kind, rows in result.items():
        print(f"{kind:6} {rows[-1]['bytes']:8.0f} MB {rows[-1]['bytes'] / 100:8.1f} TB")
    return result


def main() -> None:
    parser = get_args_parser(__doc__, rounds=3)
    parser.add_argument("--max_vectors", type=int, default=100_000, help="of the growth, from 10,000 in steps of ten")
    parser.add_argument("--queries", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    sizes = [n for n in (10**p for p in range(4, 8)) if n <= args.max_vectors] or [args.max_vectors]
    queries = generated_vectors(args.queries, seed=0).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        result = {"overhead": bench_overhead(Path(folder), sizes[-1], queries, args.rounds)}
        result["growth"] = bench_growth(Path(folder), sizes, queries)
    ratio = result["overhead"]["search"]["ours"]["over_faiss"]["median"]
    finish(args, result, {"search within 5 % of bare faiss": ratio <= 1.05}, (torch, faiss))


if __name__ == "__main__":
    main()
