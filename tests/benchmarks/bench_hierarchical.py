"""k-means in two levels, as DeeperCluster clusters its images, beside faiss alone on the same vectors.

    python tests/benchmarks/bench_hierarchical.py [--threads 2] [--out FILE.json]

Implementations, alternated on the same whitened features in one process, from the same rows, as many iterations:

- ``faiss``: k-means of faiss into super-clusters, then k-means of faiss of the rows of each of them;
- ``ours``: :func:`deepercluster.clustering.find_clusters`;
- ``flat faiss``: k-means of faiss into all clusters at once.

Then N and K vary; exponents are slopes in log-log scale (1: linear).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import faiss
import numpy as np
import torch
from torch import Tensor

import shared.run.passive_threads  # noqa: F401
from deepercluster.clustering import Clusters, Groups, Layout, Whitening, find_clusters
from tests.benchmarks.harness import alternate, clustered_features, compare, finish, get_args_parser, growth

SEED, ITERATIONS = 0, 10


def faiss_kmeans(rows: Tensor, start: Tensor) -> np.ndarray:
    """Clusters by faiss from given centroids."""
    number, dim = start.shape
    clustering = faiss.Clustering(dim, number)
    clustering.niter = ITERATIONS
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, len(rows)
    faiss.copy_array_to_vector(start.numpy().ravel(), clustering.centroids)
    index = faiss.IndexFlatL2(dim)
    clustering.train(rows.numpy(), index)
    return index.search(rows.numpy(), 1)[1][:, 0]


def two_levels_of_faiss(rows: Tensor, super_clusters: int, clusters: int) -> None:
    """From the rows that :func:`find_clusters` starts from."""
    chosen = np.random.RandomState(SEED).choice(len(rows), super_clusters, replace=False)
    supers = torch.from_numpy(faiss_kmeans(rows, rows[torch.from_numpy(chosen)]))
    for s in range(super_clusters):
        part, number = rows[supers == s], clusters // super_clusters
        start = np.random.RandomState(SEED + 1 + s).choice(len(part), number, replace=len(part) < number)
        faiss_kmeans(part, part[torch.from_numpy(start)])


def ours(rows: Tensor, super_clusters: int, clusters: int) -> Clusters:
    groups = Groups(Layout(1, super_clusters, rotnet=False))
    return find_clusters(rows, len(rows), groups, clusters, ITERATIONS, SEED, len(rows))


def main() -> None:
    parser = get_args_parser(__doc__, rounds=5)
    parser.add_argument("--images", type=int, default=40_000, help="N")
    parser.add_argument("--dim", type=int, default=256, help="of the whitened features")
    parser.add_argument("--super_clusters", type=int, default=4)
    parser.add_argument("--clusters", type=int, default=2000, help="K, of all super-clusters together")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    features = clustered_features(args.images, args.dim, SEED)
    rows = Whitening.fit(features, args.dim)(features)
    c, k = args.super_clusters, args.clusters
    print(f"{args.images} x {args.dim} features, {c} super-clusters, K = {k}")
    flat = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))[:k]]
    ways = {
        "faiss": lambda: two_levels_of_faiss(rows, c, k),
        "ours": lambda: ours(rows, c, k),
        "flat faiss": lambda: faiss_kmeans(rows, flat),
    }
    result = {"ways": compare(alternate(ways, args.rounds), "faiss"), "growth": {}}
    images, clusters = [args.images // 4, args.images // 2, args.images], [k // 2, k, 2 * k]
    for name, sizes, step in (
        ("images", images, lambda n: ours(rows[:n], c, k)),
        ("clusters", clusters, lambda number: ours(rows, c, number)),
    ):
        result["growth"][name] = growth(name, sizes, step, args.rounds)
    targets = {"at most 1.1 times faiss": result["ways"]["ours"]["over_faiss"]["median"] <= 1.1}
    finish(args, result, targets, packages=(torch, faiss))


if __name__ == "__main__":
    main()
