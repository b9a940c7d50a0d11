import copy
import math

import pytest
import torch
from torch import nn

from shared.optimisation.optim import clip_grad_norm_per_tensor_, step_unless_not_finite
from swav.larc import LARC
from tests.shared.optimisation.test_optim import NoReads, make_network, set_gradients, state_of


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


def guarded_step(network: nn.Module, optimizer: LARC) -> torch.Tensor:
    return step_unless_not_finite(optimizer, clip_grad_norm_per_tensor_(network.parameters(), 0))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("good_steps", [0, 2])
def test_a_step_with_a_gradient_that_is_not_finite_leaves_everything_as_it_was(poison, good_steps):
    network = make_network()
    optimizer = LARC(network.parameters(), lr=0.1, weight_decay=0.1)
    for seed in range(good_steps):
        set_gradients(network, seed)
        assert guarded_step(network, optimizer) == 0
    before = state_of(network, optimizer)
    set_gradients(network, seed=9)
    network[0].weight.grad[1, 2] = poison
    assert guarded_step(network, optimizer) == 1
    after = state_of(network, optimizer)
    for old, new in zip(before, after[: len(before)], strict=True):
        assert torch.equal(old, new)
    assert all(not new.any() for new in after[len(before) :])  # state made by a first step is empty


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


def test_nothing_in_a_guarded_step_reads_a_value():
    network = make_network()
    optimizer = LARC(network.parameters(), lr=0.1, weight_decay=0.1)
    set_gradients(network, seed=0)
    with NoReads():
        guarded_step(network, optimizer)
