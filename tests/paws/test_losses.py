"""What the losses promise beyond the values of ``tests/golden/test_paws.py``."""

import torch

from paws.losses import paws_loss, sharpen, support_labels

K, S, V, D = 4, 3, 2, 8  # classes, supports of each, views, dimensions


def test_targets_get_no_gradient_and_a_prediction_of_zero_gives_no_nan():
    generator = torch.Generator().manual_seed(0)
    rows = {"anchors": 12, "anchor_supports": V * S * K, "targets": 6, "target_supports": V * S * K}
    inputs = {name: torch.randn(n, D, generator=generator).requires_grad_() for name, n in rows.items()}
    labels = support_labels(S, K, views=V)
    ploss, rloss, _ = paws_loss(**inputs, labels=labels, temperature=0.001)  # most votes underflow
    (ploss + rloss).backward()
    assert inputs["targets"].grad is None and inputs["target_supports"].grad is None
    assert inputs["anchors"].grad.isfinite().all() and inputs["anchor_supports"].grad.isfinite().all()


def test_sharpening_keeps_the_order_and_is_the_identity_at_one():
    p = torch.softmax(torch.randn(5, K, generator=torch.Generator().manual_seed(0)), dim=1)
    torch.testing.assert_close(sharpen(p, 1.0), p)
    sharp = sharpen(p, 0.25)
    assert torch.equal(sharp.argsort(dim=1), p.argsort(dim=1))
    assert (sharp.amax(dim=1) > p.amax(dim=1)).all()
    torch.testing.assert_close(sharp.sum(dim=1), torch.ones(5))


def test_labels_of_several_views_are_in_the_order_in_which_processes_gather_them():
    labels = support_labels(S, 2, world_size=3, unique_classes=True, smoothing=0.3, views=V)
    assert labels.shape == (3 * V * S * 2, 6)
    found = labels.argmax(dim=1).view(3, V, S, 2)  # rank, view, image, class
    for rank in range(3):
        assert (found[rank] == torch.tensor([2 * rank, 2 * rank + 1])).all()
