"""What the loss promises beyond the values of ``tests/golden/test_msn.py``: its invariants and its priors."""

import pytest
import torch
from torch import Tensor

from msn.losses import MSNLoss, log_power_law, read_log_prior

K, D, B, V = 6, 5, 4, 3


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, D, generator=generator) for rows in (V * B, B, K))


def test_targets_sharpened_beyond_float32_are_still_assignments():
    _, targets, prototypes = batch()
    for use_sinkhorn in (False, True):
        criterion = MSNLoss(K, temperature=0.1, use_sinkhorn=use_sinkhorn)
        found = criterion.target_assignments(torch.ones(3, D), torch.ones(K, D), 0.01)  # every power is 0
        torch.testing.assert_close(found, torch.full((3, K), 1 / K))
        sharp = criterion.target_assignments(targets, prototypes, 0.003)
        torch.testing.assert_close(sharp.sum(dim=1), torch.ones(B))


def test_priors_are_those_of_a_power_law_or_of_a_file(tmp_path):
    prior = log_power_law(5, 0.25).exp()
    torch.testing.assert_close(prior.sum(), torch.tensor(1.0))
    torch.testing.assert_close(prior / prior[0], torch.arange(1, 6) ** -0.25)
    (tmp_path / "prior.txt").write_text("4 1\n3\n2e0 10")
    found = read_log_prior(tmp_path / "prior.txt", 5).exp()
    torch.testing.assert_close(found, torch.tensor([0.2, 0.05, 0.15, 0.1, 0.5]))


def test_the_prior_is_where_mean_assignments_are_drawn_to():
    """me-max is the divergence from it: 0 there and positive elsewhere."""
    prior = torch.tensor([0.4, 0.1, 0.3, 0.1, 0.05, 0.05])
    criterion = MSNLoss(K, temperature=1.0, use_sinkhorn=False, log_prior=prior.log())
    anchors, targets, prototypes = batch()
    mean = criterion.log_assignments(anchors, prototypes).exp().mean(dim=0)
    divergence = (mean * (mean / prior).log()).sum()
    torch.testing.assert_close(criterion(anchors, targets, prototypes, 0.25).me_max, divergence)
    one_hot = torch.eye(K)[torch.arange(K).repeat_interleave((20 * prior).round().long())]  # 8 of the first, 2, 6, ...
    assigned = MSNLoss(K, temperature=0.01, use_sinkhorn=False, log_prior=prior.log())
    at_the_prior = assigned(one_hot, one_hot, torch.eye(K), 0.25).me_max
    torch.testing.assert_close(at_the_prior, torch.tensor(0.0), rtol=0, atol=1e-6)
    assert divergence > 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3", r"expected 4 positive numbers \(--num_proto\), found 3"),
        ("1 2 3 0", "expected 4 positive numbers"),
        ("1 2 3 inf", "expected 4 positive numbers"),
        ("1, 2, 3, 4", r"prior.txt cannot be read"),
        (None, r"prior.txt cannot be read"),
    ],
)
def test_files_that_hold_no_prior_are_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "prior.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_log_prior(tmp_path / "prior.txt", 4)
