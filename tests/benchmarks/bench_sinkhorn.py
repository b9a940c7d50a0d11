"""Sinkhorn-Knopp on 4,096 samples and 3,000 prototypes, 3 iterations, float32.

    python tests/benchmarks/bench_sinkhorn.py [--threads 2] [--out FILE.json]

Implementations, alternated in one process:

- ``textbook``: exp, then each normalisation as a sum and a division of the whole matrix;
- ``ours``: ``sinkhorn_knopp``, which looks for the range of the scores and then scales two vectors;
- ``bounded``: the same with ``max_abs_score=1``, as for cosines;
- ``middle``: at an epsilon for which two scaling vectors leave float32, but the textbook form does not overflow yet;
- ``wide``: scores of 1e4 epsilon; the textbook form overflows there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
import torch.nn.functional as F
from torch import Tensor

import shared.run.passive_threads  # noqa: F401
from shared.sinkhorn import sinkhorn_knopp
from tests.benchmarks.harness import alternate, compare, finish, get_args_parser


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
    parser = get_args_parser(__doc__, rounds=15)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--prototypes", type=int, default=3000)
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
    result = {
        "largest_difference_from_textbook": max(
            (answers[name] - answers["textbook"]).abs().max().item() for name in ("ours", "bounded")
        ),
        "wide_rows_sum_to_1": bool(((answers["wide"].sum(dim=1) - 1).abs() < 1e-5).all()),
        "textbook_fails_on_wide_scores": not textbook(scores, epsilon=1e-4).isfinite().all().item(),
    }
    print(f"{args.samples} x {args.prototypes}, {args.threads} threads;", result)
    result["ways"] = compare(alternate(ways, args.rounds), "textbook")
    targets = {"right at 1e4 epsilon": result["wide_rows_sum_to_1"]} | {
        f"not slower than the textbook loop: {name}": result["ways"][name]["over_textbook"]["median"] <= 1
        for name in ("ours", "middle", "wide")
    }
    finish(args, result, targets)


if __name__ == "__main__":
    main()
