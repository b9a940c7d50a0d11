"""The loss by slow loops from the paper, its invariants, its prior, and two processes against one."""

import math

import pytest
import torch
from torch import Tensor

from msn.losses import MSNLoss, log_power_law, new_prototypes
from shared import distributed
from tests.processes import run_processes

K, D, B, V = 6, 5, 4, 3


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randn(V * B, D, generator=generator, dtype=torch.float64).float()
    return anchors, torch.randn(B, D, generator=generator), torch.randn(K, D, generator=generator)


def slow_terms(anchors: Tensor, targets: Tensor, prototypes: Tensor, tau: float, sharpen: float) -> list[float]:
    """Cross-entropy, KL of the mean from uniform, mean entropy: eq. 1 with loops, in float64."""

    def assign(z: Tensor) -> list[float]:
        cosines = [float(torch.cosine_similarity(z.double(), q.double(), dim=0)) for q in prototypes]
        powers = [math.exp(c / tau) for c in cosines]
        return [power / sum(powers) for power in powers]

    predictions = [assign(z) for z in anchors]
    cross_entropy = entropy = 0.0
    for row, p in enumerate(predictions):
        t = [value ** (1 / sharpen) for value in assign(targets[row % len(targets)])]
        t = [value / sum(t) for value in t]
        cross_entropy -= sum(t_k * math.log(p_k) for t_k, p_k in zip(t, p, strict=True)) / len(predictions)
        entropy -= sum(p_k * math.log(p_k) for p_k in p) / len(predictions)
    mean = [sum(p[k] for p in predictions) / len(predictions) for k in range(len(prototypes))]
    return [cross_entropy, math.log(len(mean)) + sum(m * math.log(m) for m in mean), entropy]


def test_terms_are_those_of_a_slow_loop():
    anchors, targets, prototypes = batch()
    criterion = MSNLoss(K, temperature=0.2, memax_weight=3.0, use_ent=True, ent_weight=0.5, use_sinkhorn=False)
    terms = criterion(anchors, targets, prototypes, 0.25)
    expected = slow_terms(anchors, targets, prototypes, 0.2, 0.25)
    found = [terms.cross_entropy, terms.me_max, terms.entropy]
    torch.testing.assert_close(torch.stack(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.total, found[0] + 3 * found[1] + 0.5 * found[2])


def test_sharpened_targets_are_a_softmax_at_a_lower_temperature():
    _, targets, prototypes = batch()
    criterion = MSNLoss(K, temperature=0.1, use_sinkhorn=False)
    cosines = torch.nn.functional.cosine_similarity(targets[:, None], prototypes[None], dim=2)
    found = criterion.target_assignments(targets, prototypes, 0.25)
    torch.testing.assert_close(found, (cosines / 0.025).softmax(dim=1), rtol=1e-3, atol=1e-6)


def test_targets_sharpened_beyond_float32_are_still_assignments():
    _, targets, prototypes = batch()
    for use_sinkhorn in (False, True):
        criterion = MSNLoss(K, temperature=0.1, use_sinkhorn=use_sinkhorn)
        found = criterion.target_assignments(torch.ones(3, D), torch.ones(K, D), 0.01)  # every power is 0
        torch.testing.assert_close(found, torch.full((3, K), 1 / K))
        sharp = criterion.target_assignments(targets, prototypes, 0.003)
        torch.testing.assert_close(sharp.sum(dim=1), torch.ones(B))


def test_sinkhorn_balances_the_targets():
    criterion = MSNLoss(K, temperature=1.0)
    _, _, prototypes = batch()
    found = criterion.target_assignments(
        torch.randn(32, D, generator=torch.Generator().manual_seed(1)), prototypes, 1.0
    )
    torch.testing.assert_close(found.sum(dim=0), torch.full((K,), 32 / K), rtol=0.02, atol=0)


def test_prototypes_learn_from_the_anchors_only():
    anchors, targets, prototypes = batch()
    targets.requires_grad_()
    prototypes.requires_grad_()
    MSNLoss(K)(anchors, targets, prototypes, 0.25).total.backward()
    assert targets.grad is None and prototypes.grad.abs().max() > 0
    # a prototype's length does not matter, so its gradient is orthogonal to it
    torch.testing.assert_close((prototypes.grad * prototypes).sum(dim=1), torch.zeros(K), rtol=0, atol=1e-6)


def test_a_collapse_costs_ln_k_and_even_use_nothing():
    prototypes = torch.eye(K)
    criterion = MSNLoss(K, temperature=0.01, use_sinkhorn=False)
    same = criterion(prototypes[:1].expand(K, K), prototypes[:1].expand(K, K), prototypes, 0.25)
    even = criterion(prototypes, prototypes, prototypes, 0.25)
    torch.testing.assert_close(same.me_max, torch.tensor(math.log(K)))
    torch.testing.assert_close(even.me_max, torch.tensor(0.0), rtol=0, atol=1e-6)


def test_power_law_prior():
    prior = log_power_law(5, 0.25).exp()
    torch.testing.assert_close(prior.sum(), torch.tensor(1.0))
    torch.testing.assert_close(prior / prior[0], torch.arange(1, 6) ** -0.25)
    torch.testing.assert_close(log_power_law(5, 0.0).exp(), torch.full((5,), 0.2))


def test_the_prior_is_where_mean_assignments_are_drawn_to():
    """Gradient descent on the mean assignment alone ends at the prior."""
    criterion = MSNLoss(4, temperature=1.0, use_sinkhorn=False, power_law_exponent=1.0)
    logits = torch.zeros(4, requires_grad=True)
    for _ in range(300):
        mean = logits.softmax(dim=0)
        (gradient,) = torch.autograd.grad((mean * (mean.log() - criterion.log_prior)).sum(), logits)
        logits = (logits - 2 * gradient).detach().requires_grad_()
    torch.testing.assert_close(logits.softmax(dim=0), torch.tensor([12.0, 6, 4, 3]) / 25, rtol=1e-3, atol=1e-4)
    anchors, targets, prototypes = batch()
    uniform, power = (MSNLoss(K, use_sinkhorn=False, power_law_exponent=e) for e in (0.0, 0.5))
    mean = uniform.log_assignments(anchors, prototypes).exp().mean(dim=0)
    difference = power(anchors, targets, prototypes, 0.25).me_max - uniform(anchors, targets, prototypes, 0.25).me_max
    torch.testing.assert_close(difference, (mean * (uniform.log_prior - power.log_prior)).sum(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "--temperature 0"),
        ({"label_smoothing": 1}, "--label_smoothing 1"),
        ({"power_law_exponent": 0.25}, "--use_sinkhorn true"),
        ({"power_law_exponent": -1, "use_sinkhorn": False}, "--power_law_exponent -1"),
    ],
)
def test_values_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MSNLoss(K, **arguments)


def test_anchors_that_are_not_views_of_the_targets_are_refused():
    anchors, targets, prototypes = batch()
    with pytest.raises(ValueError, match="11 anchors are not the views of 4 targets"):
        MSNLoss(K)(anchors[:11], targets, prototypes, 0.25)


def test_prototypes_are_drawn_within_their_bound():
    prototypes = new_prototypes(100, 16)
    assert prototypes.shape == (100, 16) and 0.24 < prototypes.abs().max() <= 0.25


def half_of_a_batch(rank: int) -> dict[str, Tensor]:
    """Averaged over processes, as the training does."""
    anchors, targets, prototypes = batch()
    mine = targets.chunk(2)[rank]
    anchors = anchors.unflatten(0, (V, B)).chunk(2, dim=1)[rank].flatten(0, 1)
    network = torch.nn.Linear(D, D, bias=False)
    torch.nn.init.eye_(network.weight)
    prototypes.requires_grad_()
    terms = MSNLoss(K, memax_weight=2.0, use_ent=True)(network(anchors), mine, prototypes, 0.5)
    terms.total.backward()
    gradients = {"network": network.weight.grad, "prototypes": prototypes.grad, "total": terms.total.detach()}
    return {name: distributed.all_reduce_mean(value) for name, value in gradients.items()}


def test_two_processes_with_half_a_batch_give_value_and_gradients_of_one_with_all_of_it():
    anchors, targets, prototypes = batch()
    network = torch.nn.Linear(D, D, bias=False)
    torch.nn.init.eye_(network.weight)
    prototypes.requires_grad_()
    terms = MSNLoss(K, memax_weight=2.0, use_ent=True)(network(anchors), targets, prototypes, 0.5)
    terms.total.backward()
    for found in run_processes(half_of_a_batch, 2):
        torch.testing.assert_close(found["total"], terms.total.detach())
        torch.testing.assert_close(found["network"], network.weight.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["prototypes"], prototypes.grad, rtol=1e-4, atol=1e-6)
