"""Cost of DeepCluster's clustering step, features given, against its limit: k-means of faiss alone.

    python tests/benchmarks/bench_clustering.py [--threads 2] [--out FILE.json]

Ways that take turns on the same features in one process, all with 20 iterations from the same rows:

- ``faiss``: k-means of faiss on features that are whitened already;
- ``step``: the whole step, PCA with whitening and k-means of faiss;
- ``pca``: PCA with whitening alone;
- ``torch``: k-means in torch, for machines without faiss and for GPUs.

Then N and K are halved and doubled, to see how the step grows; exponents are slopes in log-log scale (1: linear).
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

from deepcluster.clustering import cluster, kmeans_faiss, kmeans_torch, pca_whiten

SEED = 0


def generated_features(num_images: int, dim: int) -> Tensor:
    """Rows around 1,000 centres, with variances that fall over the dimensions as those of real features do."""
    generator = torch.Generator().manual_seed(SEED)
    centres = torch.randn(1000, dim, generator=generator)
    labels = torch.randint(1000, (num_images,), generator=generator)
    features = centres[labels] + torch.randn(num_images, dim, generator=generator)
    return features * torch.arange(1, dim + 1) ** -0.25


def starting_rows(whitened: Tensor, num_clusters: int) -> Tensor:
    """Those from which :func:`deepcluster.clustering.kmeans` starts."""
    generator = torch.Generator().manual_seed(SEED)
    return whitened[torch.randperm(len(whitened), generator=generator)[:num_clusters]]


def clustering_step(features: Tensor, pca_dim: int, num_clusters: int, backend: str) -> Tensor:
    return cluster(pca_whiten(features, pca_dim)[0], "Kmeans", num_clusters, SEED, backend).assignments


def seconds(way: Callable) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def compare(features: Tensor, pca_dim: int, num_clusters: int, rounds: int) -> dict:
    """Times of all ways, and their ratios to faiss alone, round by round."""
    whitened, _ = pca_whiten(features, pca_dim)
    start = starting_rows(whitened, num_clusters)
    ways = {
        "faiss": lambda: kmeans_faiss(whitened, start),
        "step": lambda: clustering_step(features, pca_dim, num_clusters, "faiss"),
        "pca": lambda: pca_whiten(features, pca_dim),
        "torch": lambda: kmeans_torch(whitened, start),
    }
    for way in ways.values():  # warm up
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(way))
    result = {}
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times["faiss"], strict=True)]
        over = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        result[name] = {"seconds": values, "over_faiss": over}
    return result


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
    ways = compare(features, args.pca_dim, args.clusters, args.rounds)
    print(f"{'way':6} {'seconds':>8}  over faiss")
    for name, entry in ways.items():
        over = entry["over_faiss"]
        spread = f"{over['median']:.2f} ({over['min']:.2f} .. {over['max']:.2f})"
        print(f"{name:6} {statistics.median(entry['seconds']):8.2f}  {spread}")

    images = [args.images // 4, args.images // 2, args.images]
    clusters = [args.clusters // 2, args.clusters, 2 * args.clusters]
    grows = {
        "images": growth(
            images, lambda n: lambda: clustering_step(features[:n], args.pca_dim, args.clusters, "faiss"), args.rounds
        ),
        "clusters": growth(
            clusters, lambda k: lambda: clustering_step(features, args.pca_dim, k, "faiss"), args.rounds
        ),
    }
    for name, entry in grows.items():
        points = ", ".join(f"{size}: {value:.2f} s" for size, value in entry["seconds"].items())
        print(f"growth with the number of {name}: exponent {entry['exponent']:.2f} ({points})")
    result = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": {name: value for name, value in vars(args).items() if name != "out"},
        "versions": {module.__name__: module.__version__ for module in (torch, faiss, np)},
        "ways": ways,
        "growth": grows,
    }
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
