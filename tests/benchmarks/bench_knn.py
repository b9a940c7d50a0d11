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

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import faiss
import torch
import torch.nn.functional as F

import shared.run.passive_threads  # noqa: F401
from shared.evaluation import knn
from shared.evaluation.knn import nearest_neighbours
from shared.networks.weights import safe_load
from shared.optimisation.precision import fast_bf16
from tests.benchmarks.harness import alternate, clustered_features, compare, finish, get_args_parser, peak_mib


def plain_search(queries: torch.Tensor, database: torch.Tensor, k: int):
    found = [(chunk @ database.t()).topk(k, dim=1) for chunk in queries.split(max(1, len(queries) // 100))]
    return torch.cat([values for values, _ in found]), torch.cat([indices for _, indices in found])


def product(queries: torch.Tensor, database: torch.Tensor) -> None:
    out = torch.empty(len(database), knn.QUERY_BLOCK)
    for chunk in queries.split(knn.QUERY_BLOCK):
        torch.mm(database, chunk.t(), out=out[:, : len(chunk)])


def main() -> None:
    parser = get_args_parser(__doc__, rounds=5)
    parser.add_argument("--features", help="folder written by dino/eval_knn.py --dump_features; none: generated")
    parser.add_argument("--train", type=int, default=100_000, help="size of the database")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--k", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)

    if args.features:
        names = ("trainfeat.pth", "testfeat.pth")
        database, queries = (safe_load(Path(args.features) / name).float().contiguous() for name in names)
    else:
        sizes = enumerate((args.train, args.queries), start=1)
        database, queries = (F.normalize(clustered_features(n, args.dim, seed), dim=1) for seed, n in sizes)
    index = faiss.IndexFlatIP(database.shape[1])
    index.add(database.numpy())
    ways = {
        "faiss": lambda: tuple(map(torch.from_numpy, index.search(queries.numpy(), args.k))),
        "plain": lambda: plain_search(queries, database, args.k),
        "ours": lambda: nearest_neighbours(queries, database, args.k),
        "product": lambda: product(queries, database),
    }
    if is_fast_in_bf16 := fast_bf16(database.device):
        ways["bf16"] = lambda: nearest_neighbours(queries, database, args.k, precision="bf16")
    print(
        f"{len(queries)} queries, {len(database)} x {database.shape[1]}, k = {args.k}, {args.threads} threads,", end=""
    )
    print(f" bfloat16 {'fast' if is_fast_in_bf16 else 'emulated: not used'}")

    facts, answers, notes = {}, {}, {}
    for name, way in ways.items():  # the peak of the process only grows, so the small ways come first
        before = peak_mib()
        answers[name] = way()
        facts[name] = {"added_peak_mib": peak_mib() - before}
    for name, (similarities, indices) in ((n, answer) for n, answer in answers.items() if answer is not None):
        agreement = (indices == answers["faiss"][1]).float().mean().item()
        difference = (similarities - answers["faiss"][0]).abs().max().item()
        facts[name] |= {"agreement": agreement, "largest_difference": difference}
        notes[name] = f"{100 * agreement:.3f} % of faiss's neighbours, similarities within {difference:.1e}"
    rows = compare(alternate(ways, args.rounds), "faiss", notes)
    bound = rows["product"]["over_faiss"]["median"]
    print(f"the float32 product alone takes {bound:.2f} of faiss: no exact search that computes all of it takes less")
    result = {"bfloat16": is_fast_in_bf16, "ways": {name: row | facts[name] for name, row in rows.items()}}
    finish(args, result, {"ours below 0.50 of faiss": rows["ours"]["over_faiss"]["median"] < 0.5}, (torch, faiss))


if __name__ == "__main__":
    main()
