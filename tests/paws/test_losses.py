"""The objectives against slow loops written from the papers, and two processes against one."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paws.losses import paws_loss, sharpen, simclr_loss, suncet_loss, support_labels
from tests.processes import run_processes

K, S, V, D = 4, 3, 2, 8  # classes, supports of each, views, dimensions


def batch(seed: int = 0, images: int = 3, small: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def rows(n: int) -> Tensor:
        return torch.randn(n, D, generator=generator)

    return {
        "anchors": rows((2 + small) * images),
        "anchor_supports": rows(V * S * K),
        "targets": rows(2 * images),
        "target_supports": rows(V * S * K),
    }


def slow_probabilities(query: Tensor, supports: Tensor, labels: Tensor, temperature: float) -> list[float]:
    """Equation 1, one number at a time."""
    weights = [math.exp(F.cosine_similarity(query, support, dim=0).item() / temperature) for support in supports]
    total = sum(weights)
    return [
        sum(w / total * label[k].item() for w, label in zip(weights, labels, strict=True))
        for k in range(labels.shape[1])
    ]


def slow_sharpen(p: list[float], temperature: float) -> list[float]:
    powers = [value ** (1 / temperature) for value in p]
    return [value / sum(powers) for value in powers]


def test_the_loss_is_that_of_the_paper():
    inputs, labels = batch(), support_labels(S, K, smoothing=0.1, views=V)
    images = len(inputs["targets"]) // 2
    predictions = [slow_probabilities(a, inputs["anchor_supports"], labels, 0.1) for a in inputs["anchors"]]
    targets = [
        slow_sharpen(slow_probabilities(t, inputs["target_supports"], labels, 0.1), 0.25) for t in inputs["targets"]
    ]
    total = 0.0
    for i, p in enumerate(predictions):
        view, image = divmod(i, images)
        if view < 2:
            target = targets[i]
        else:  # small views learn from the mean of both large ones
            target = [(a + b) / 2 for a, b in zip(targets[image], targets[images + image], strict=True)]
        total -= sum(t * math.log(q) for t, q in zip(target, p, strict=True) if t >= 1e-4)
    sharpened = [slow_sharpen(p, 0.25) for p in predictions]
    mean = [sum(column) / len(sharpened) for column in zip(*sharpened, strict=True)]
    ploss, rloss = paws_loss(**inputs, labels=labels, temperature=0.1, sharpen_temperature=0.25)
    assert ploss.item() == pytest.approx(total / len(predictions), rel=1e-4)
    assert rloss.item() == pytest.approx(sum(m * math.log(m) for m in mean), rel=1e-4)
    assert paws_loss(**inputs, labels=labels, me_max=False)[1] == 0


def test_targets_get_no_gradient_and_a_prediction_of_zero_gives_no_nan():
    inputs = {name: value.requires_grad_() for name, value in batch().items()}
    hard = support_labels(S, K, views=V)
    ploss, rloss = paws_loss(**inputs, labels=hard, temperature=0.001)  # most votes underflow
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


def test_labels_of_supports_are_in_the_order_in_which_processes_gather_them():
    labels = support_labels(S, 2, world_size=3, unique_classes=True, smoothing=0.3, views=V)
    assert labels.shape == (3 * V * S * 2, 6)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(len(labels)))
    found = labels.argmax(dim=1).view(3, V, S, 2)  # rank, view, image, class
    for rank in range(3):
        assert (found[rank] == torch.tensor([2 * rank, 2 * rank + 1])).all()
    shared = support_labels(S, 2, world_size=3, smoothing=0.3, views=V)
    assert (shared.argmax(dim=1).view(-1, 2) == torch.tensor([0, 1])).all()
    torch.testing.assert_close(shared.sum(dim=1), torch.full((len(shared),), 0.7 + 3 * 0.3))  # as released


def slow_suncet(z: Tensor, labels: Tensor, temperature: float) -> float:
    total = 0.0
    for i, own in enumerate(z):
        others = [j for j in range(len(z)) if j != i]
        p = slow_probabilities(own, z[others], labels[others], temperature)
        total -= sum(y.item() * math.log(q) for y, q in zip(labels[i], p, strict=True))
    return total / len(z)


def test_suncet_and_simclr_are_those_of_the_paper():
    z = batch()["anchor_supports"]
    labels = support_labels(S, K, smoothing=0.2, views=V)
    assert suncet_loss(z, labels, 0.2).item() == pytest.approx(slow_suncet(z, labels, 0.2), rel=1e-4)
    views, total = batch()["targets"], 0.0
    images = len(views) // 2
    for i, own in enumerate(views):
        scores = {
            j: math.exp(F.cosine_similarity(own, views[j], dim=0).item() / 0.5) for j in range(len(views)) if j != i
        }
        total -= math.log(scores[(i + images) % len(views)] / sum(scores.values()))
    assert simclr_loss(views, 0.5).item() == pytest.approx(total / len(views), rel=1e-4)


def losses_and_gradients(rank: int | None, inputs: list[dict[str, Tensor]], labels: Tensor) -> list[Tensor]:
    """PAWS and SuNCEt of one of two processes, or of one that has the data of both."""
    if rank is None:
        mine = {name: torch.cat([part[name] for part in inputs]) for name in inputs[0]}
        images = len(inputs[0]["targets"]) // 2  # put back into view-major order
        for name in ("anchors", "targets"):
            parts = [part[name].unflatten(0, (-1, images)) for part in inputs]
            mine[name] = torch.cat(parts, dim=1).flatten(0, 1)
    else:
        mine = inputs[rank]
    mine = {name: value.clone().requires_grad_() for name, value in mine.items()}
    ploss, rloss = paws_loss(**mine, labels=labels)
    suncet = suncet_loss(mine["anchor_supports"], labels)
    (ploss + rloss + suncet).backward()
    return [ploss.detach(), rloss.detach(), suncet.detach(), mine["anchors"].grad, mine["anchor_supports"].grad]


def test_two_processes_have_the_loss_and_the_gradients_of_one_with_all_of_it():
    inputs = [batch(seed) for seed in (1, 2)]
    labels = support_labels(S, K, world_size=2, unique_classes=True, smoothing=0.1, views=V)
    one = losses_and_gradients(None, inputs, labels)
    two = run_processes(losses_and_gradients, 2, inputs, labels)
    for i in (0, 2):
        torch.testing.assert_close((two[0][i] + two[1][i]) / 2, one[i])
    for rank in range(2):
        torch.testing.assert_close(two[rank][1], one[1])  # me-max is about the mean of all
    images = len(inputs[0]["targets"]) // 2
    anchors = torch.cat([two[r][3].unflatten(0, (-1, images)) for r in range(2)], dim=1).flatten(0, 1)
    torch.testing.assert_close(anchors / 2, one[3])  # data-parallel training averages over processes
    torch.testing.assert_close(torch.cat([two[r][4] for r in range(2)]) / 2, one[4])
