"""Steps that LARS leaves out, and its groups; its updates are in ``tests/golden/test_paws.py``."""

import pytest
import torch
from torch import nn

from paws.encoder import build_encoder
from paws.optimisation import LARS, parameter_groups
from shared.optimisation.optim import step_unless_not_finite


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((4, 3), (5,), (2, 2, 3, 3))]


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
