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

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import faiss
import numpy as np
import torch
from torch import Tensor

from deepcluster.clustering import cluster, first_rows, kmeans_faiss, kmeans_torch, pca_whiten
from swav.kmeans import spherical_kmeans

SEED = 0


def generated_features(num_images: int, dim: int) -> Tensor:
    """Rows around 1,000 centres, with variances that fall over the dimensions as those of real features do."""
    generator = torch.Generator().manual_seed(SEED)
    centres = torch.randn(1000, dim, generator=generator)
    labels = torch.randint(1000, (num_images,), generator=generator)
    features = centres[labels] + torch.randn(num_images, dim, generator=generator)
    return features * torch.arange(1, dim + 1) ** -0.25


def clustering_step(features: Tensor, pca_dim: int, num_clusters: int, backend: str) -> Tensor:
    return cluster(pca_whiten(features, pca_dim)[0], "Kmeans", num_clusters, SEED, backend).assignments


def seconds(way: Callable) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


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


def compare(ways: dict[str, Callable], rounds: int) -> dict:
    """Times of all ways, and their ratios to the first one, round by round."""
    for way in ways.values():  # warm up
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(way))
    limit = next(iter(times.values()))
    result = {}
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, limit, strict=True)]
        over = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        result[name] = {"seconds": values, "over_faiss": over}
    return result


def show(heading: str, ways: dict) -> None:
    print(f"{heading:14} {'seconds':>8}  over faiss")
    for name, entry in ways.items():
        over = entry["over_faiss"]
        spread = f"{over['median']:.2f} ({over['min']:.2f} .. {over['max']:.2f})"
        print(f"{name:14} {statistics.median(entry['seconds']):8.2f}  {spread}")


def growth(sizes: list[int], step: Callable[[int], Callable], rounds: int) -> dict:
    """Median seconds of ``step(size)`` for each size, and the exponent between the smallest and the largest."""
    times = {size: statistics.median(seconds(step(size)) for _ in range(rounds)) for size in sizes}
    exponent = math.log(times[sizes[-1]] / times[sizes[0]]) / math.log(sizes[-1] / sizes[0])
    return {"seconds": times, "exponent": exponent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=20_000, help="N")
    parser.add_argument("--dim", type=int, default=512, help="dimensions of the features")
    parser.add_argument("--pca_dim", type=int, default=128)
    parser.add_argument("--clusters", type=int, default=250, help="K")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="JSON file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)

    features = generated_features(args.images, args.dim)
    print(
        f"{args.images} x {args.dim} features, {args.pca_dim} components, K = {args.clusters}, {args.threads} threads"
    )
    whitened, _ = pca_whiten(features, args.pca_dim)
    start = whitened[first_rows(args.images, args.clusters, SEED)]
    ways = {
        "deepcluster": {
            "faiss": lambda: kmeans_faiss(whitened, start),
            "step": lambda: clustering_step(features, args.pca_dim, args.clusters, "faiss"),
            "pca": lambda: pca_whiten(features, args.pca_dim),
            "torch": lambda: kmeans_torch(whitened, start),
        },
        "deepclusterv2": {
            "faiss": lambda: spherical_kmeans_faiss(whitened, start),
            "torch": lambda: spherical_kmeans(whitened, start),
        },
    }
    times = {}
    for method, its_ways in ways.items():
        times[method] = compare(its_ways, args.rounds)
        show(method, times[method])

    def step(images: int, clusters: int) -> Callable:
        return lambda: clustering_step(features[:images], args.pca_dim, clusters, "faiss")

    def step_v2(images: int, clusters: int) -> Callable:
        rows = whitened[:images]
        return lambda: spherical_kmeans(rows, rows[first_rows(images, clusters, SEED)])

    images = [args.images // 4, args.images // 2, args.images]
    clusters = [args.clusters // 2, args.clusters, 2 * args.clusters]
    grows = {}
    for method, make in (("deepcluster", step), ("deepclusterv2", step_v2)):
        grows[f"{method}, images"] = growth(images, lambda n, make=make: make(n, args.clusters), args.rounds)
        grows[f"{method}, clusters"] = growth(clusters, lambda k, make=make: make(args.images, k), args.rounds)
    for name, entry in grows.items():
        points = ", ".join(f"{size}: {value:.2f} s" for size, value in entry["seconds"].items())
        print(f"growth of {name}: exponent {entry['exponent']:.2f} ({points})")
    result = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": {name: value for name, value in vars(args).items() if name != "out"},
        "versions": {module.__name__: module.__version__ for module in (torch, faiss, np)},
        "ways": times,
        "growth": grows,
    }
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
