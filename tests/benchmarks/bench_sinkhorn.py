"""Sinkhorn-Knopp on 4,096 samples and 3,000 prototypes, 3 iterations, float32.

    python tests/benchmarks/bench_sinkhorn.py [--threads 2] [--out FILE.json]

Implementations, alternated in one process:

- ``textbook``: exp, then each normalisation as a sum and a division of the whole matrix;
- ``ours``: ``sinkhorn_knopp``, which looks for the range of the scores and then scales two vectors;
- ``bounded``: the same with ``max_abs_score=1``, as for cosines;
- ``middle``: at an epsilon for which two scaling vectors leave float32, but the textbook form does not overflow yet;
- ``wide``: scores of 1e4 epsilon; the textbook form overflows there.
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

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.sinkhorn import sinkhorn_knopp


def textbook(scores: Tensor, epsilon: float = 0.05, num_iters: int = 3) -> Tensor:
    assignments = torch.exp(scores / epsilon).t()  # (K, B)
    num_prototypes, num_samples = assignments.shape
    assignments /= assignments.sum()
    for _ in range(num_iters):
        assignments /= assignments.sum(dim=1, keepdim=True)
        assignments /= num_prototypes
        assignments /= assignments.sum(dim=0, keepdim=True)
        assignments /= num_samples
    return (assignments * num_samples).t()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--prototypes", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="JSON file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    samples, prototypes = (F.normalize(torch.randn(n, 128), dim=1) for n in (args.samples, args.prototypes))
    scores = samples @ prototypes.t()
    ways = {
        "textbook": lambda: textbook(scores),
        "ours": lambda: sinkhorn_knopp(scores),
        "bounded": lambda: sinkhorn_knopp(scores, max_abs_score=1.0),
        "middle": lambda: sinkhorn_knopp(scores, epsilon=0.01),
        "wide": lambda: sinkhorn_knopp(scores, epsilon=1e-4),
    }
    answers = {name: way() for name, way in ways.items()}
    difference = max((answers[name] - answers["textbook"]).abs().max().item() for name in ("ours", "bounded"))
    wide_is_balanced = bool(((answers["wide"].sum(dim=1) - 1).abs() < 1e-5).all())
    overflows = not textbook(scores, epsilon=1e-4).isfinite().all()
    times = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)

    result = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "versions": {"torch": torch.__version__},
        "largest_difference_from_textbook": difference,
        "wide_rows_sum_to_1": wide_is_balanced,
        "textbook_fails_on_wide_scores": overflows,
        "ways": {},
    }
    print(f"{args.samples} x {args.prototypes}, {args.threads} threads")
    print(f"{'way':9} {'ms':>8}  time over textbook (min .. max of {args.rounds} rounds)")
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times["textbook"], strict=True)]
        spread = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        result["ways"][name] = {"seconds": values, "over_textbook": spread}
        ms = 1e3 * statistics.median(values)
        print(f"{name:9} {ms:8.1f}  {spread['median']:.2f} ({spread['min']:.2f} .. {spread['max']:.2f})")
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"largest difference from the textbook loop {difference:.1e}; wide scores: rows of ours sum to 1: "
          f"{wide_is_balanced}, the textbook loop fails: {overflows}")  # fmt: skip
    result["targets"] = {"right at 1e4 epsilon": wide_is_balanced} | {
        f"not slower than the textbook loop: {name}": result["ways"][name]["over_textbook"]["median"] <= 1
        for name in ("ours", "middle", "wide")
    }
    for target, met in result["targets"].items():
        print(f"target: {target}: {'met' if met else 'not met'}")
    print(f"peak memory {result['peak_mib']:.0f} MiB")
    print(f"versions: torch {torch.__version__}")
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
