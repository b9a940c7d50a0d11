"""Cost of the clustering steps of DeepCluster and DeepCluster-v2, features given, against their limit: faiss alone.

    python tests/benchmarks/bench_clustering.py [--threads 2] [--out FILE.json]

Implementations, alternated on the same features in one process, from the same rows. DeepCluster, 20 iterations:

- ``faiss``: k-means of faiss on features that are whitened already;
- ``step``: the whole step, PCA with whitening and k-means of faiss;
- ``pca``: PCA with whitening alone;
- ``torch``: k-means in torch, for machines without faiss and for GPUs.

DeepCluster-v2, 10 iterations on the whitened features:

- ``faiss``: spherical k-means of faiss;
- ``torch``: spherical k-means in torch, as the training runs it.

Then N and K vary, to see how the steps grow; exponents are slopes in log-log scale (1: linear).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import faiss
import torch
from torch import Tensor

import shared.run.passive_threads  # noqa: F401
from deepcluster.clustering import cluster, kmeans_faiss, kmeans_torch, pca_whiten
from swav.kmeans import spherical_kmeans
from tests.benchmarks.harness import alternate, clustered_features, compare, finish, get_args_parser, growth

SEED = 0


def clustering_step(features: Tensor, pca_dim: int, num_clusters: int) -> Tensor:
    return cluster(pca_whiten(features, pca_dim)[0], "Kmeans", num_clusters, SEED, "faiss").assignments


def spherical_kmeans_faiss(features: Tensor, centroids: Tensor, iterations: int = 10) -> None:
    """What :func:`swav.kmeans.spherical_kmeans` does, by faiss."""
    num_clusters, dim = centroids.shape
    clustering = faiss.Clustering(dim, num_clusters)
    clustering.niter, clustering.spherical = iterations, True
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, len(features)
    faiss.copy_array_to_vector(centroids.numpy().ravel(), clustering.centroids)
    index = faiss.IndexFlatIP(dim)
    clustering.train(features.numpy(), index)
    index.search(features.numpy(), 1)


def first_rows(images: int, clusters: int, seed: int) -> Tensor:
    """Rows that :func:`deepcluster.clustering.cluster` starts from."""
    return torch.randperm(images, generator=torch.Generator().manual_seed(seed))[:clusters]


def main() -> None:
    parser = get_args_parser(__doc__, rounds=5)
    parser.add_argument("--images", type=int, default=20_000, help="N")
    parser.add_argument("--dim", type=int, default=512, help="dimensions of the features")
    parser.add_argument("--pca_dim", type=int, default=128)
    parser.add_argument("--clusters", type=int, default=250, help="K")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)

    features = clustered_features(args.images, args.dim, SEED)
    print(f"{args.images} x {args.dim} features, {args.pca_dim} components, K = {args.clusters}")
    whitened, _ = pca_whiten(features, args.pca_dim)
    start = whitened[first_rows(args.images, args.clusters, SEED)]
    ways = {
        "deepcluster": {
            "faiss": lambda: kmeans_faiss(whitened, start),
            "step": lambda: clustering_step(features, args.pca_dim, args.clusters),
            "pca": lambda: pca_whiten(features, args.pca_dim),
            "torch": lambda: kmeans_torch(whitened, start),
        },
        "deepclusterv2": {
            "faiss": lambda: spherical_kmeans_faiss(whitened, start),
            "torch": lambda: spherical_kmeans(whitened, start),
        },
    }
    result = {"ways": {}, "growth": {}}
    for method, its_ways in ways.items():
        print(method)
        result["ways"][method] = compare(alternate(its_ways, args.rounds), "faiss")

    def step(images: int, clusters: int) -> None:
        clustering_step(features[:images], args.pca_dim, clusters)

    def step_v2(images: int, clusters: int) -> None:
        spherical_kmeans(whitened[:images], whitened[first_rows(images, clusters, SEED)])

    images = [args.images // 4, args.images // 2, args.images]
    clusters = [args.clusters // 2, args.clusters, 2 * args.clusters]
    for method, run in (("deepcluster", step), ("deepclusterv2", step_v2)):
        for name, sizes, one in (
            (f"{method}, images", images, lambda n, run=run: run(n, args.clusters)),
            (f"{method}, clusters", clusters, lambda k, run=run: run(args.images, k)),
        ):
            result["growth"][name] = growth(name, sizes, one, args.rounds)
    finish(args, result, packages=(torch, faiss))


if __name__ == "__main__":
    main()
