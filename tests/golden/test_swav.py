"""Sinkhorn-Knopp against assignments measured on the reference of SwAV, on one and on two processes."""

import torch

from shared.sinkhorn import sinkhorn_knopp
from tests.golden.golden_file import GoldenFile
from tests.processes import run_processes

GOLDEN = GoldenFile("swav")
CASES = [case for case in GOLDEN.cases("") if case.startswith("sinkhorn")]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-7}


def parameters(case: str) -> tuple[float, int]:
    """Epsilon, which the file stores in float32, and the number of iterations."""
    return round(GOLDEN.scalar(f"{case}/in/epsilon"), 6), GOLDEN.scalar(f"{case}/in/iters")


def test_assignments_of_one_process():
    cases = [case for case in CASES if f"{case}/in/scores" in GOLDEN]
    assert cases
    for case in cases:
        assignments = sinkhorn_knopp(GOLDEN.tensor(f"{case}/in/scores"), *parameters(case))
        torch.testing.assert_close(assignments, GOLDEN.tensor(f"{case}/out/q"), **TOLERANCE)


def balance(rank: int, scores_of_ranks: list[list[torch.Tensor]], arguments: list[tuple[float, int]]):
    return [sinkhorn_knopp(scores[rank], *a) for scores, a in zip(scores_of_ranks, arguments, strict=True)]


def of_ranks(case: str, name: str) -> list[torch.Tensor]:
    return [GOLDEN.tensor(key) for key in sorted(GOLDEN.keys(f"{case}/{name}_rank"))]


def test_assignments_of_two_processes():
    cases = [case for case in CASES if f"{case}/in/scores_rank0" in GOLDEN]
    assert cases
    scores = [of_ranks(case, "in/scores") for case in cases]
    results = run_processes(balance, len(scores[0]), scores, [parameters(case) for case in cases])
    for case, *assignments in zip(cases, *results, strict=True):
        torch.testing.assert_close(assignments, of_ranks(case, "out/q"), **TOLERANCE)


def test_every_sinkhorn_array_was_compared():
    assert not [key for case in CASES for key in GOLDEN.unread(f"{case}/")]
