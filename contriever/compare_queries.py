"""Do two retrievers differ, or is it chance? Paired tests over the queries of two files of eval_beir.py.

    python compare_queries.py hybrid/scifact.queries.jsonl dense/scifact.queries.jsonl
    python compare_queries.py hybrid/scifact.queries.jsonl dense/scifact.queries.jsonl --metrics NDCG@10 MRR@10

A line per metric: both means, the mean difference, how many queries the first one wins and loses, and the two-sided p
of three tests: Student's t, random signs of the differences (permutations), and wins against losses alone (sign test).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy import stats

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contriever.beir import PerQuery, by_id
from contriever.text.files import read_json_lines, text_field
from shared import distributed
from shared.run.flags import Parser

TIE = 1e-9  # percent: differences of rounding are none


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("first", help="<dataset>.queries.jsonl of one evaluation")
    parser.add_argument("second", help="of another one with the same judgements")
    parser.add_argument("--metrics", nargs="+", default=["NDCG@10", "MAP@100", "Recall@100", "MRR@10"], help="names")
    parser.add_argument("--permutations", type=int, default=9999, help="random ones; all of them where there are fewer")
    return parser


def read_metrics(path: str) -> PerQuery:
    """Metrics in percent by query id."""
    records = ((where, text_field(record, "query_id", where), record) for where, record in read_json_lines(path))
    return by_id(path, records)


def compare(first: np.ndarray, second: np.ndarray, permutations: int = 9999) -> dict[str, float]:
    """Paired tests of the values of two retrievers, (N,) each.

    Returns:
        ``difference`` (of the means), ``wins``, ``losses``, ``ties`` of the first, and ``t``, ``permutation`` and
        ``sign``: the p-values.
    """
    differences = np.where(np.abs(first - second) < TIE, 0.0, first - second)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    found = {"difference": float(differences.mean()), "wins": wins, "losses": losses}
    found["ties"] = len(differences) - wins - losses
    if not wins + losses:
        return found | {"t": 1.0, "permutation": 1.0, "sign": 1.0}
    found["t"] = float(stats.ttest_1samp(differences, 0).pvalue) if len(first) > 1 else float("nan")
    signs = {"permutation_type": "samples", "n_resamples": permutations, "batch": 256, "random_state": 0}
    found["permutation"] = float(stats.permutation_test((differences[differences != 0],), np.mean, **signs).pvalue)
    return found | {"sign": float(stats.binomtest(wins, wins + losses).pvalue)}


def compare_queries(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Print and return what :func:`compare` finds of each metric."""
    first, second = read_metrics(args.first), read_metrics(args.second)
    if other := first.keys() ^ second.keys():
        raise ValueError(f"{args.first} and {args.second} are of different queries: {min(other)!r} is in one of them")
    print(f"{len(first)} queries; first: {args.first}, second: {args.second}")
    print(f"{'':12s} {'first':>7s} {'second':>7s} {'differ':>7s}  wins/losses/ties  p: t  permutation  sign")
    results = {}
    for metric in args.metrics:
        lacking = next((query for query in first if metric not in first[query] or metric not in second[query]), None)
        if lacking is not None:
            names = ", ".join(name for name in first[lacking] if name != "query_id")
            raise ValueError(f"--metrics {metric}: query {lacking!r} has no such value, but {names}")
        a, b = (np.array([queries[query][metric] for query in first], float) for queries in (first, second))
        found = results[metric] = compare(a, b, args.permutations)
        record = "/".join(str(found[name]) for name in ("wins", "losses", "ties"))
        p_values = "  ".join(f"{found[name]:.4g}" for name in ("t", "permutation", "sign"))
        print(f"{metric:12s} {a.mean():7.2f} {b.mean():7.2f} {found['difference']:+7.2f}  {record:16s}  {p_values}")
    return results


def main() -> None:
    distributed.run_script(compare_queries, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
