import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.optimisation.larc import LARC
from shared.sinkhorn import sinkhorn_knopp
from swav.losses import EmbeddingQueue, SwappedPrediction, cluster_classification
from tests.processes import run_processes


def make_scores(crops: int = 5, batch: int = 3, nmb_prototypes: int = 7) -> torch.Tensor:
    return torch.rand(crops, batch, nmb_prototypes, generator=torch.Generator().manual_seed(0)) * 2 - 1


def codes_of(scores: torch.Tensor, crops_for_assign) -> list[torch.Tensor]:
    return [sinkhorn_knopp(scores[crop]) for crop in crops_for_assign]


def loop_over_pairs(scores, codes, crops_for_assign, temperature):
    """Algorithm 1 with a loop over pairs of crops, in double precision."""
    scores, total = scores.double(), 0.0
    for code, crop in zip(codes, crops_for_assign, strict=True):
        of_this_code = 0.0
        for other in range(len(scores)):
            if other != crop:
                p = F.softmax(scores[other] / temperature, dim=1)
                of_this_code = of_this_code - (code.double() * p.log()).sum(dim=1).mean()
        total = total + of_this_code / (len(scores) - 1)
    return total / len(codes)


@pytest.mark.parametrize("crops_for_assign", [[0, 1], [1], [4, 0, 2]])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_loss_and_gradient_equal_those_of_a_loop_over_pairs(crops_for_assign, temperature):
    scores = make_scores().requires_grad_()
    codes = codes_of(scores, crops_for_assign)
    expected = loop_over_pairs(scores, codes, crops_for_assign, temperature)
    loss = SwappedPrediction(crops_for_assign, temperature)(scores, codes)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (found,), (gradient,) = (torch.autograd.grad(value, scores) for value in (loss, expected))
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)


def test_classification_is_the_mean_over_heads_and_ignores_images_without_a_cluster():
    scores = [make_scores(1, 12, k)[0].requires_grad_() for k in (5, 3)]
    assignments = torch.tensor([[4, -100, 0, 1], [2, -100, 1, 0]])
    loss = cluster_classification(scores, assignments, 0.1)
    expected = 0.0
    for head_scores, clusters in zip(scores, assignments, strict=True):
        rows = [(r, int(clusters[r % 4])) for r in range(12) if clusters[r % 4] >= 0]
        log_p = (head_scores.double() / 0.1).log_softmax(dim=1)
        expected = expected - sum(log_p[r, c] for r, c in rows) / len(rows) / 2
    torch.testing.assert_close(loss.double(), expected)
    loss.backward()
    assert all(not s.grad[1::4].any() and s.grad[0].any() for s in scores)


def test_a_batch_without_any_cluster_has_a_loss_of_zero():
    scores = [make_scores(1, 4, 5)[0].requires_grad_()]
    loss = cluster_classification(scores, torch.full((1, 2), -100))
    loss.backward()
    assert loss == 0 and not scores[0].grad.any()


def test_rows_that_are_not_finite_do_not_enter_the_queue():
    queue = EmbeddingQueue(1, 4, 2)
    first, second = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[5.0, math.nan], [7, 8]])
    queue.push(0, first)
    queue.push(0, second)
    assert queue.embeddings[0].tolist() == [[1, 2], [7, 8], [1, 2], [3, 4]]


def fill_and_save(rank: int) -> dict:
    queue = EmbeddingQueue(1, 4, 1)
    queue.has_started = True
    for step in range(2):  # the value of an image is 10 * step + its place in the step on all processes
        queue.push(0, torch.tensor([[10.0 * step + rank], [10.0 * step + 2 + rank]]))
    state = queue.state_dict()
    again = EmbeddingQueue(1, 4, 1)
    again.load_state_dict(state)
    assert torch.equal(again.embeddings, queue.embeddings) and again.pushed == queue.pushed
    return state


def test_the_queue_of_two_processes_becomes_that_of_one_with_its_newest_rows_first():
    state, other = run_processes(fill_and_save, 2)
    assert torch.equal(state["embeddings"], other["embeddings"])
    queue = EmbeddingQueue(1, 8, 1)
    queue.load_state_dict(state)
    assert queue.embeddings.flatten().tolist() == [10, 11, 12, 13, 0, 1, 2, 3]
    assert queue.pushed == [8] and queue.is_full(0)
    with pytest.raises(ValueError, match="--queue_length"):
        EmbeddingQueue(1, 6, 1).load_state_dict(state)


def test_a_queue_has_no_state_before_it_is_used():
    queue, absent = EmbeddingQueue(1, 4, 1), EmbeddingQueue(1, 0, 1)
    assert queue.state_dict() is None
    queue.load_state_dict({})
    assert not queue.is_used
    queue.has_started = absent.has_started = True
    assert queue.is_used and not absent.is_used and absent.state_dict() is None
    absent.load_state_dict(queue.state_dict())  # --queue_length 0 drops it
    assert not absent.is_used


def test_an_official_queue_file_counts_the_rows_that_were_written():
    stored = torch.zeros(2, 4, 3)
    stored[:, :2] = 1.0
    queue = EmbeddingQueue(2, 4, 3)
    queue.load_rows(stored)
    assert queue.pushed == [2, 2] and not queue.is_full(0)
    with pytest.raises(ValueError, match=r"\(2, 4, 3\)"):
        EmbeddingQueue(2, 6, 3).load_rows(stored)


# --- LARC -------------------------------------------------------------------------------------------------------------


def by_loops(p, g, buffer, lr, weight_decay, clip):
    """The definition with plain numbers for the norms; returns the new tensor and momentum."""
    p_norm, g_norm = math.sqrt((p**2).sum()), math.sqrt((g**2).sum())
    if p_norm > 0 and g_norm > 0:
        rate = 0.001 * p_norm / (g_norm + weight_decay * p_norm + 1e-8)
        if clip:
            rate = min(rate / lr, 1)
        g = rate * (g + weight_decay * p)
    buffer = 0.9 * buffer + g
    return p - lr * buffer, buffer


def test_the_state_of_plain_sgd_is_taken_over_with_its_gaps():
    network = nn.Linear(3, 2)
    sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    network.weight.grad = torch.ones(2, 3)
    sgd.step()  # the bias, like frozen prototypes, has no momentum yet
    optimizer = LARC(network.parameters(), lr=0.0)
    optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))
    before = sgd.state[network.weight]["momentum_buffer"].clone()
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    weight, bias = network.weight.detach().double(), network.bias.detach().double()
    expected = [
        by_loops(weight, torch.ones(2, 3).double(), before.double(), 0.1, 0.1, clip=False)[0],
        by_loops(bias, torch.ones(2).double(), torch.zeros(2).double(), 0.1, 0.1, clip=False)[0],
    ]
    optimizer.step()
    for found, p in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach().double(), p, rtol=1e-5, atol=1e-7)
