import torch
from torch import nn

from shared import distributed
from shared.networks.batchnorm import has_batchnorm, synchronize_batchnorm
from tests.processes import run_processes


def normalize_shares(rank, rows, weights, group_size=None):
    """Each of two ranks normalises half of the rows; the loss weighs every entry differently."""
    torch.manual_seed(0)
    norm = nn.Sequential(nn.BatchNorm2d(3))
    norm[0].weight.data.uniform_(0.5, 2)
    norm[0].bias.data.uniform_(-1, 1)
    norm = synchronize_batchnorm(norm, torch.device("cpu"), group_size)
    share = slice(None) if distributed.get_world_size() == 1 else slice(4 * rank, 4 * rank + 4)
    x = rows[share].clone().requires_grad_()
    out = norm(x)
    (out * weights[share]).sum().backward()
    buffers = {name: value.clone() for name, value in norm[0].named_buffers()}
    return {"out": out.detach(), "grad": x.grad, "bias_grad": norm[0].bias.grad, **buffers}


def test_two_processes_normalise_like_one_with_the_whole_batch():
    torch.manual_seed(1)
    rows, weights = torch.randn(2, 8, 3, 4, 5)
    one = normalize_shares(0, rows, weights)
    two = run_processes(normalize_shares, 2, rows, weights)
    for name in ("out", "grad"):
        torch.testing.assert_close(torch.cat([r[name] for r in two]), one[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two[0]["bias_grad"] + two[1]["bias_grad"], one["bias_grad"], rtol=1e-4, atol=1e-5)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(two[0][name], one[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(two[0][name], two[1][name])


def normalize_half_precision(rank, rows):
    norm = synchronize_batchnorm(nn.BatchNorm2d(3), torch.device("cpu"))
    out = norm(rows[rank::2].bfloat16())
    return {"out": out.detach(), "running_mean": norm.running_mean, "running_var": norm.running_var}


def test_half_precision_has_statistics_in_float32():
    torch.manual_seed(1)
    rows = 3 + torch.randn(8, 3, 4, 5)
    norm = nn.BatchNorm2d(3)
    expected = norm(rows.bfloat16())
    for rank, found in enumerate(run_processes(normalize_half_precision, 2, rows)):
        assert found["out"].dtype == torch.bfloat16
        torch.testing.assert_close(found["out"], expected[rank::2].detach())
        torch.testing.assert_close(found["running_mean"], norm.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["running_var"], norm.running_var, rtol=1e-5, atol=1e-6)


def test_groups_of_processes_normalise_on_their_own():
    torch.manual_seed(1)
    rows, weights = torch.randn(2, 8, 3, 4, 5)
    two = run_processes(normalize_shares, 2, rows, weights, 1)
    for rank, found in enumerate(two):
        share = slice(4 * rank, 4 * rank + 4)
        expected = normalize_shares(0, rows[share], weights[share])
        for name in ("out", "grad", "bias_grad", "running_var"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_networks_with_batchnorm_are_recognised():
    assert has_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert not has_batchnorm(nn.LayerNorm(2))
