"""LARS against a loop over tensors, its groups, skipped steps, and the learning rate of every step."""

import numpy as np
import pytest
import torch
from torch import nn

from paws.encoder import build_encoder
from paws.optimisation import LARS, lr_schedule, parameter_groups
from shared.optimisation.optim import step_unless_not_finite


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((4, 3), (5,), (2, 2, 3, 3))]


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_is_what_a_loop_over_tensors_computes(nesterov):
    params = [nn.Parameter(t) for t in tensors(0)]
    expected = [t.clone() for t in tensors(0)]
    velocity = [torch.zeros_like(t) for t in expected]
    groups = [{"params": [params[0], params[2]], "weight_decay": 0.1}, {"params": [params[1]], "LARS_exclude": True}]
    optimizer = LARS(groups, nesterov=nesterov)
    for step, lr in enumerate((0.5, 2.0, 0.1)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for i, (p, g) in enumerate(zip(params, tensors(step + 1), strict=True)):
            p.grad = g
            if i != 1:
                rate = 0.001 * expected[i].norm() / (g.norm() + 0.1 * expected[i].norm() + 1e-8)
                g = rate * (g + 0.1 * expected[i])
            velocity[i] = 0.9 * velocity[i] - lr * g
            expected[i] = expected[i] + (0.9 * velocity[i] - lr * g if nesterov else velocity[i])
        optimizer.step()
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), e)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_that_is_left_out_changes_nothing(nesterov):
    params = [nn.Parameter(t) for t in tensors(0)]
    optimizer = LARS([{"params": params}], lr=1.0, nesterov=nesterov)
    for p, g in zip(params, tensors(1), strict=True):
        p.grad = g
    step_unless_not_finite(optimizer, torch.ones(1))
    before = [p.detach().clone() for p in params] + [optimizer.state[p]["momentum_buffer"].clone() for p in params]
    params[0].grad = torch.full_like(params[0], torch.nan)
    assert step_unless_not_finite(optimizer, torch.tensor([torch.nan])) == 1
    after = [p.detach() for p in params] + [optimizer.state[p]["momentum_buffer"] for p in params]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_biases_and_batch_norms_are_excluded_but_for_that_of_a_shortcut():
    with torch.device("meta"):
        encoder = build_encoder("resnet50", 16, use_pred_head=True)
    adapted, excluded = parameter_groups(encoder, 1e-6)
    names = {id(p): name for name, p in encoder.named_parameters()}
    vectors = {names[id(p)] for p in adapted["params"] if p.ndim == 1}
    assert vectors == {f"layer{i}.0.downsample.1.weight" for i in range(1, 5)}  # its name has no "bn"
    assert all(p.ndim == 1 for p in excluded["params"]) and excluded["weight_decay"] == 0
    assert len(adapted["params"]) + len(excluded["params"]) == len(names)


def test_in_networks_of_libraries_all_vectors_are_excluded():
    adapted, _ = parameter_groups(build_encoder("test_resnet", 16), 1e-6)
    assert all(p.ndim > 1 for p in adapted["params"])


def test_learning_rate_starts_low_peaks_once_and_ends_low():
    rates = lr_schedule(0.3, 6.4, 0.064, warmup_steps=10, total_steps=100)
    assert rates[0] == 0.3 and rates[10] == 6.4 and (rates == 6.4).sum() == 1
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:]) < 0).all() and rates[-1] >= 0.064
    assert lr_schedule(0.3, 6.4, 0.064, 0, 5)[0] == 6.4
