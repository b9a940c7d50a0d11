import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from paws.optimisation import LARS as PawsLARS
from shared.optimisation.larc import LARC
from shared.optimisation.optim import (
    build_optimizer,
    clip_grad_norm_per_tensor_,
    ema_update_,
    load_optimizer_state,
    param_groups_no_decay_on_bias_and_norm,
    step_unless_not_finite,
)
from shared.optimisation.schedules import cosine_schedule, teacher_temperature_schedule

OPTIMIZERS = ["adamw", "sgd", "lars", "LARC of SwAV", "LARS of PAWS", "LARS of PAWS, Nesterov"]


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def set_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def build(name: str, network: nn.Module) -> torch.optim.Optimizer:
    """One of ``OPTIMIZERS``."""
    groups = param_groups_no_decay_on_bias_and_norm(network)
    if name == "LARC of SwAV":
        return LARC(network.parameters(), lr=0.0)
    if name.startswith("LARS of PAWS"):
        return PawsLARS(groups, nesterov=name.endswith("Nesterov"))
    return build_optimizer(name, groups)


def state_of(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    tensors = [p.detach() for p in network.parameters()]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return [t.clone() for t in tensors]


def test_biases_and_one_dimensional_tensors_are_not_decayed():
    network = make_network()
    network.token = nn.Parameter(torch.zeros(1, 1, 4))
    network[2].weight.requires_grad = False
    names = {id(p): name for name, p in network.named_parameters()}
    decayed, plain = param_groups_no_decay_on_bias_and_norm(network)
    assert [names[id(p)] for p in decayed["params"]] == ["token", "0.weight"]
    assert [names[id(p)] for p in plain["params"]] == ["0.bias", "1.weight", "1.bias", "2.bias"]
    assert plain["weight_decay"] == 0


def reference_optimizer(name, groups):
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=False, foreach=False)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=False, foreach=False)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_fused_optimisers_follow_torchs_plain_ones_also_when_a_tensor_joins_late(name):
    networks = make_network(), make_network()
    makers = build_optimizer, reference_optimizer
    optimizers = [
        make(name, param_groups_no_decay_on_bias_and_norm(n)) for make, n in zip(makers, networks, strict=True)
    ]
    assert optimizers[0].defaults["fused"]
    for step in range(6):
        for network, optimizer in zip(networks, optimizers, strict=True):
            set_rates(optimizer, lr=0.1 / (step + 1), weight_decay=0.05 * step)
            set_gradients(network, seed=step)
            if step < 3:
                network[2].weight.grad = None  # a frozen last layer
            optimizer.step()
        for found, expected in zip(*(n.parameters() for n in networks), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def as_saved_by_old_torch(state: dict) -> dict:
    """Steps were whole numbers then, and no group knew of implementations."""
    state = copy.deepcopy(state)
    new = ("fused", "foreach", "capturable", "differentiable", "decoupled_weight_decay", "maximize")
    return {
        "state": {i: s | ({"step": int(s["step"])} if "step" in s else {}) for i, s in state["state"].items()},
        "param_groups": [
            {key: value for key, value in group.items() if key not in new} for group in state["param_groups"]
        ],
    }


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_states_of_torchs_plain_optimisers_are_gone_on_with_and_bad_steps_still_left_out(name):
    network = make_network()
    plain = reference_optimizer(name, param_groups_no_decay_on_bias_and_norm(network))
    for step in range(2):
        set_rates(plain, lr=0.1, weight_decay=0.05)
        set_gradients(network, seed=step)
        network[2].weight.grad = None  # the frozen last layer has no state yet
        plain.step()
    twin = copy.deepcopy(network)
    resumed = build_optimizer(name, param_groups_no_decay_on_bias_and_norm(twin))
    load_optimizer_state(resumed, as_saved_by_old_torch(plain.state_dict()))
    for step in range(2, 4):
        for n in (network, twin):
            set_gradients(n, seed=step)
        plain.step()
        norms = clip_grad_norm_per_tensor_(twin.parameters(), 0)
        assert step_unless_not_finite(resumed, norms) == 0
    for found, expected in zip(twin.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)

    before = state_of(twin, resumed)
    set_gradients(twin, seed=4)
    twin[0].weight.grad[0, 0] = math.nan
    assert step_unless_not_finite(resumed, clip_grad_norm_per_tensor_(twin.parameters(), 0)) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(twin, resumed), strict=True))


def test_lars_equals_its_formula():
    """A loop over tensors with plain numbers for the norms, from the method's definition."""
    network = make_network()
    network[0].weight.data.zero_()  # a norm of zero: no scaling
    optimizer = build_optimizer("lars", param_groups_no_decay_on_bias_and_norm(network))
    expected = [p.detach().double().clone() for p in network.parameters()]
    buffers = [torch.zeros_like(p) for p in expected]
    for step in range(4):
        lr, weight_decay = 2.0 / (step + 1), 0.1
        set_rates(optimizer, lr, weight_decay)
        set_gradients(network, seed=step)
        for p, buffer, parameter in zip(expected, buffers, network.parameters(), strict=True):
            update = parameter.grad.double()
            if p.ndim > 1:
                update = update + weight_decay * p
                p_norm, update_norm = math.sqrt((p**2).sum()), math.sqrt((update**2).sum())
                if p_norm > 0 and update_norm > 0:
                    update = update * 0.001 * p_norm / update_norm
            buffer.mul_(0.9).add_(update)
            p.sub_(lr * buffer)
        optimizer.step()
        for found, p in zip(network.parameters(), expected, strict=True):
            torch.testing.assert_close(found.detach().double(), p, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("good_steps", [0, 2])
def test_a_step_with_a_gradient_that_is_not_finite_leaves_everything_as_it_was(name, poison, good_steps):
    network = make_network()
    optimizer = build(name, network)
    set_rates(optimizer, lr=0.1, weight_decay=0.1)
    for seed in range(good_steps):
        set_gradients(network, seed)
        assert step_unless_not_finite(optimizer, clip_grad_norm_per_tensor_(network.parameters(), 3.0)) == 0
    before = state_of(network, optimizer)
    set_gradients(network, seed=9)
    network[0].weight.grad[1, 2] = poison
    assert step_unless_not_finite(optimizer, clip_grad_norm_per_tensor_(network.parameters(), 3.0)) == 1
    after = state_of(network, optimizer)
    for old, new in zip(before, after[: len(before)], strict=True):
        assert torch.equal(old, new)
    assert all(not new.any() for new in after[len(before) :])  # state made by a first step is empty

    twin = make_network()
    twin_optimizer = build(name, twin)
    set_rates(twin_optimizer, lr=0.1, weight_decay=0.1)
    for seed in [*range(good_steps), 5]:
        set_gradients(twin, seed)
        step_unless_not_finite(twin_optimizer, clip_grad_norm_per_tensor_(twin.parameters(), 3.0))
    set_gradients(network, 5)
    step_unless_not_finite(optimizer, clip_grad_norm_per_tensor_(network.parameters(), 3.0))
    for found, expected in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected)  # training goes on as if the bad step had not been


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_optimiser_goes_on_as_the_original(name):
    networks = make_network(), make_network()
    optimizers = [build(name, n) for n in networks]
    for step in range(4):
        if step == 2:
            networks[1].load_state_dict(networks[0].state_dict())
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))  # as through a file
        for network, optimizer in zip(networks, optimizers, strict=True):
            set_rates(optimizer, lr=0.1, weight_decay=0.1)
            set_gradients(network, step)
            if step >= 2 or network is networks[0]:
                optimizer.step()
    for found, expected in zip(*(n.parameters() for n in networks), strict=True):
        assert torch.equal(found, expected)


def test_every_tensor_is_clipped_to_its_own_norm():
    network = make_network()
    set_gradients(network, seed=0)
    network[2].bias.grad = None
    gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    norms = clip_grad_norm_per_tensor_(network.parameters(), max_norm=2.4)
    for p, gradient, norm in zip(network.parameters(), gradients, norms, strict=False):
        torch.testing.assert_close(norm, gradient.norm())
        expected = gradient if norm <= 2.4 else gradient * (2.4 / (norm + 1e-6))
        torch.testing.assert_close(p.grad, expected)
    assert (norms > 2.4).any() and (norms < 2.4).any()


def test_a_cap_of_zero_measures_only():
    network = make_network()
    set_gradients(network, seed=0)
    gradients = [p.grad.clone() for p in network.parameters()]
    norms = clip_grad_norm_per_tensor_(network.parameters(), max_norm=0)
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), gradients, strict=True))
    torch.testing.assert_close(norms, torch.stack([g.norm() for g in gradients]))


class NoReads(TorchDispatchMode):
    """Fails when a tensor's value is brought to Python, which would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_in_the_update_reads_a_value(name):
    network, average = make_network(), make_network()
    optimizer = build(name, network)
    set_rates(optimizer, lr=0.1, weight_decay=0.1)
    set_gradients(network, seed=0)
    with NoReads():
        norms = clip_grad_norm_per_tensor_(network.parameters(), 3.0)
        step_unless_not_finite(optimizer, norms)
        ema_update_(average.parameters(), network.parameters(), 0.99)
    with pytest.raises(AssertionError, match="a value was read"), NoReads():
        norms.sum().item()


# --- Schedules --------------------------------------------------------------------------------------------------------


def test_cosine_schedule_equals_its_formula():
    values = cosine_schedule(base=2.0, final=0.5, epochs=5, steps_per_epoch=4, warmup_epochs=2, start=0.1)
    warmup = [0.1 + (2.0 - 0.1) * i / 7 for i in range(8)]  # both ends included
    cosine = [0.5 + (2.0 - 0.5) / 2 * (1 + math.cos(math.pi * j / 12)) for j in range(12)]
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, warmup + cosine, rtol=1e-14)


def test_a_warmup_may_last_part_of_an_epoch():
    values = cosine_schedule(1.0, 0.0, epochs=2, steps_per_epoch=10, warmup_epochs=0.5)
    np.testing.assert_allclose(values[:5], np.linspace(0, 1, 5))
    assert len(values) == 20 and values[5] == 1.0


def test_a_warmup_longer_than_training_is_refused():
    with pytest.raises(ValueError, match="warm-up of 4 epochs does not fit into 3 epochs"):
        cosine_schedule(1.0, 0.0, epochs=3, steps_per_epoch=2, warmup_epochs=4)
    with pytest.raises(ValueError, match="temperature warm-up of 4 epochs does not fit into 3 epochs"):
        teacher_temperature_schedule(0.04, 0.07, warmup_epochs=4, epochs=3)
