"""Exact nearest neighbours of 10,000 queries among 100,000 features of 384 dimensions, k = 20, in float32.

    python tests/benchmarks/bench_knn.py [--features FOLDER] [--threads 2] [--out FILE.json]

Implementations, alternated on the same features in one process:

- ``faiss``: ``IndexFlatIP``, an exact search;
- ``plain``: a matrix product per 1 % of the queries and ``topk`` on it, as the published scripts do;
- ``ours``: ``nearest_neighbours``; where the CPU is fast in bfloat16 it screens in it and proves the result;
- ``bf16``: the same with bfloat16 products alone, where the CPU is fast in them;
- ``product``: the float32 matrix product and nothing else, the bound for every way that computes it in full.

Neighbours are compared with those of faiss: the share of equal ones, and the largest difference in similarity at the
same rank, which says whether unequal ones are mere ties.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import faiss
import numpy as np
import torch
import torch.nn.functional as F

from shared.evaluation import knn
from shared.evaluation.knn import nearest_neighbours
from shared.networks.weights import safe_load
from shared.optimisation.precision import fast_bf16


def generated_features(num_samples: int, dim: int, seed: int) -> torch.Tensor:
    """Unit vectors around 1,000 centres, with variances that fall over the dimensions as those of real features do."""
    centres = torch.randn(1000, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(1000, (num_samples,), generator=generator)
    features = centres[labels] + torch.randn(num_samples, dim, generator=generator)
    return F.normalize(features * torch.arange(1, dim + 1) ** -0.25, dim=1)


def plain_search(queries: torch.Tensor, database: torch.Tensor, k: int):
    found = [(chunk @ database.t()).topk(k, dim=1) for chunk in queries.split(max(1, len(queries) // 100))]
    return torch.cat([values for values, _ in found]), torch.cat([indices for _, indices in found])


def product(queries: torch.Tensor, database: torch.Tensor) -> None:
    out = torch.empty(len(database), knn.QUERY_BLOCK)
    for chunk in queries.split(knn.QUERY_BLOCK):
        torch.mm(database, chunk.t(), out=out[:, : len(chunk)])


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--features", help="folder written by dino/eval_knn.py --dump_features (default: generated)")
    parser.add_argument("--train", type=int, default=100_000, help="size of the database")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="JSON file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)

    if args.features:
        names = ("trainfeat.pth", "testfeat.pth")
        database, queries = (safe_load(Path(args.features) / name).float().contiguous() for name in names)
    else:
        database = generated_features(args.train, args.dim, seed=1)
        queries = generated_features(args.queries, args.dim, seed=2)
    index = faiss.IndexFlatIP(database.shape[1])
    index.add(database.numpy())
    ways = {
        "faiss": lambda: tuple(map(torch.from_numpy, index.search(queries.numpy(), args.k))),
        "plain": lambda: plain_search(queries, database, args.k),
        "ours": lambda: nearest_neighbours(queries, database, args.k),
        "product": lambda: product(queries, database),
    }
    is_fast_in_bf16 = fast_bf16(database.device)
    if is_fast_in_bf16:
        ways["bf16"] = lambda: nearest_neighbours(queries, database, args.k, precision="bf16")
    print(
        f"{len(queries)} queries, {len(database)} x {database.shape[1]}, k = {args.k}, {args.threads} threads, ", end=""
    )
    print(f"bfloat16 {'fast' if is_fast_in_bf16 else 'emulated: not used'}")

    peaks, answers = {}, {}
    for name, way in ways.items():  # warm up; the peak of the process only grows, so the small ways come first
        before = peak_mib()
        answers[name] = way()
        peaks[name] = peak_mib() - before
    times = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)

    operations = 2 * len(queries) * database.numel()
    result = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "bfloat16": is_fast_in_bf16,
        "versions": {module.__name__: module.__version__ for module in (torch, faiss, np)},
        "ways": {},
    }
    print(f"{'way':8} {'seconds':>8} {'GFLOP/s':>8}  {'time over faiss':20}  neighbours as faiss")
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times["faiss"], strict=True)]
        entry = {
            "seconds": values,
            "over_faiss": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "added_peak_mib": peaks[name],
        }
        agreement = ""
        if answers[name] is not None:
            similarities, indices = answers[name]
            entry["agreement"] = (indices == answers["faiss"][1]).float().mean().item()
            entry["largest_difference"] = (similarities - answers["faiss"][0]).abs().max().item()
            agreement = f"{100 * entry['agreement']:.3f} %, similarities within {entry['largest_difference']:.1e}"
        result["ways"][name] = entry
        seconds = statistics.median(values)
        spread = f"{entry['over_faiss']['median']:.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        print(f"{name:8} {seconds:8.2f} {operations / seconds / 1e9:8.0f}  {spread:20}  {agreement}")
    result["peak_mib"] = peak_mib()
    result["target_met"] = met = result["ways"]["ours"]["over_faiss"]["median"] < 0.5
    bound = result["ways"]["product"]["over_faiss"]["median"]
    print(f"the float32 product alone takes {bound:.2f} of faiss: no exact search that computes all of it takes less")
    print(f"target: ours below 0.50 of faiss: {'met' if met else 'not met'}; peak memory {result['peak_mib']:.0f} MiB")
    print("versions:", ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
