import math

import pytest
import torch
import torch.nn.functional as F

from shared import distributed, sinkhorn
from shared.sinkhorn import sinkhorn_knopp
from tests.processes import run_processes


def cosines(num_samples, num_prototypes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    samples, prototypes = (torch.randn(n, 4, generator=generator) for n in (num_samples, num_prototypes))
    return F.normalize(samples, dim=1) @ F.normalize(prototypes, dim=1).t()


def log_sum_exp(values):
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))


def slow_sinkhorn(scores, epsilon, num_iters):
    """The iteration entry by entry on Python's floats, in logarithms."""
    rows = [[score / epsilon for score in row] for row in scores.double().tolist()]
    B, K = len(rows), len(rows[0])
    total = log_sum_exp([value for row in rows for value in row])
    rows = [[value - total for value in row] for row in rows]
    for _ in range(num_iters):
        for k in range(K):
            mass = log_sum_exp([row[k] for row in rows])
            for row in rows:
                row[k] -= mass + math.log(K)
        for row in rows:
            mass = log_sum_exp(row)
            row[:] = [value - mass - math.log(B) for value in row]
    return torch.tensor([[B * math.exp(value) for value in row] for row in rows])


@pytest.mark.parametrize("num_iters", [0, 1, 3, 20])
@pytest.mark.parametrize("epsilon", [1.0, 0.05, 0.02, 1e-4])
def test_assignments_equal_a_loop_over_entries(epsilon, num_iters):
    """1e-4 puts the logarithms between -1e4 and 1e4."""
    scores = cosines(12, 7)
    torch.testing.assert_close(
        sinkhorn_knopp(scores, epsilon, num_iters), slow_sinkhorn(scores, epsilon, num_iters), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("num_iters", [0, 1, 3])
def test_both_forms_of_the_iteration_give_the_same(num_iters, monkeypatch):
    scores, expected = cosines(50, 20), sinkhorn_knopp(cosines(50, 20), num_iters=num_iters)
    monkeypatch.setattr(sinkhorn, "SCALING_LIMIT", 0.0)
    monkeypatch.setattr(sinkhorn, "BLOCK_SIZE", 7 * 20)
    torch.testing.assert_close(sinkhorn_knopp(scores, num_iters=num_iters), expected, rtol=1e-4, atol=1e-7)


def competing_blocks(limit):
    """Two blocks of samples that compete for unequal shares of the prototypes need the widest scaling vectors."""
    blocks = torch.full((40, 20), -limit)
    blocks[:20, :1] = limit
    blocks[20:, 1:] = limit
    cross = torch.full((20, 40), limit)
    cross[0] = cross[:, 0] = -limit
    return blocks, cross, blocks.t().contiguous(), -cross


@pytest.mark.parametrize("limit", [sinkhorn.SCALING_LIMIT, 40.0, 300.0, 1e4])
@pytest.mark.parametrize("num_iters", [1, 30])
def test_prototypes_that_samples_compete_for_are_shared_at_any_range(limit, num_iters):
    for scores in competing_blocks(limit):
        expected = slow_sinkhorn(scores, 1.0, num_iters)
        torch.testing.assert_close(sinkhorn_knopp(scores, 1.0, num_iters), expected, rtol=1e-4, atol=1e-7)


def test_scores_of_half_precision_and_autocast_are_balanced_in_float32():
    scores = cosines(30, 10).half()  # exp(1 / 0.05) is beyond the range of float16
    expected = sinkhorn_knopp(scores.float())
    torch.testing.assert_close(sinkhorn_knopp(scores), expected, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(sinkhorn_knopp(scores), expected, rtol=0, atol=0)


def test_no_gradient_flows_and_the_scores_stay_as_they_are():
    scores = cosines(30, 10).requires_grad_()
    before = scores.detach().clone()
    assert not sinkhorn_knopp(scores).requires_grad
    assert torch.equal(scores, before)


def test_nan_scores_are_not_hidden():
    scores = cosines(30, 10)
    scores[0, 0] = torch.nan
    assert sinkhorn_knopp(scores).isnan().any()


@pytest.mark.parametrize("arguments", [{"epsilon": 0.0}, {"epsilon": -1.0}, {"num_iters": -1}])
def test_impossible_parameters_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        sinkhorn_knopp(cosines(3, 3), **arguments)


CASES = [(epsilon, n, bound) for epsilon in (0.05, 0.02, 1e-4) for n in (0, 3) for bound in (None, 1.0)]


def balance_share(rank):
    """Assignments of this rank's half of the rows and the number of collectives, per case."""
    calls = 0

    def counted(collective):
        def call(tensor):
            nonlocal calls
            calls += 1
            return collective(tensor)

        return call

    distributed.all_gather = counted(distributed.all_gather)
    distributed.all_reduce_sum = counted(distributed.all_reduce_sum)
    results = []
    for epsilon, num_iters, bound in CASES:
        calls = 0
        results.append((sinkhorn_knopp(cosines(24, 7)[12 * rank :][:12], epsilon, num_iters, bound), calls))
    return results


def test_two_processes_give_the_assignments_of_one_with_one_collective_per_iteration():
    ranks = run_processes(balance_share, 2)
    for (epsilon, num_iters, bound), *shares in zip(CASES, *ranks, strict=True):
        together = torch.cat([assignments for assignments, _ in shares])
        alone = sinkhorn_knopp(cosines(24, 7), epsilon, num_iters)
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-7)
        assert [calls for _, calls in shares] == [max(num_iters, 1) + (bound is None)] * 2


def balance_unequal_share(rank, scores):
    """Assignments of this rank's half of the rows, and whether its scalings were ever absorbed after the first one."""
    sinkhorn.ABSORPTION_LIMIT, made, matrix = 0.95, [], sinkhorn._matrix
    sinkhorn._matrix = lambda *args: made.append(len(args)) or matrix(*args)
    return sinkhorn._scale_with_absorption(scores[8 * rank :][:8], 0.05, 3), len(made) > 1


def test_processes_whose_samples_need_absorbing_at_different_times_agree():
    scores = cosines(16, 7)
    scores[8:] *= 0.01  # the rows of the second process are nearly uniform
    ranks = run_processes(balance_unequal_share, 2, scores)
    assert [absorbed for _, absorbed in ranks] == [True, False]
    together = torch.cat([assignments for assignments, _ in ranks])
    torch.testing.assert_close(together, slow_sinkhorn(scores, 0.05, 3).float(), rtol=1e-4, atol=1e-6)
