import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.evaluation.linear import LinearClassifier, train_one_epoch, validate

CPU = torch.device("cpu")


class Points(torch.utils.data.Dataset):
    """Points around three centres; ``labels[i]`` is the class of point i."""

    def __init__(self, num_points, noise=0.3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(num_points) % 3
        self.points = 3 * torch.eye(3)[self.labels] + noise * torch.randn(num_points, 3, generator=generator)

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        return self.points[index], int(self.labels[index]), index

    def batches(self, batch_size):
        return list(zip(self.points.split(batch_size), self.labels.split(batch_size), strict=True))


def test_training_separates_classes_and_leaves_the_network_alone():
    torch.manual_seed(0)
    network, classifier = nn.Linear(3, 8), LinearClassifier(8, 3)
    before = network.weight.clone()
    optimizer = torch.optim.SGD([*classifier.parameters(), *network.parameters()], lr=0.1, momentum=0.9)
    losses = [train_one_epoch(classifier, network, Points(60).batches(10), optimizer) for _ in range(5)]
    assert losses[0] > losses[-1]
    assert validate(classifier, network, Points(30, seed=1), CPU)["acc1"] == 100
    assert torch.equal(network.weight, before)


def test_the_mean_loss_counts_every_image_once():
    """Batches of 4, 4 and 2 images and a learning rate of 0."""
    points, classifier = Points(10), LinearClassifier(3, 3)
    loss = train_one_epoch(classifier, nn.Identity(), points.batches(4), torch.optim.SGD(classifier.parameters(), lr=0))
    assert loss == pytest.approx(F.cross_entropy(classifier(points.points), points.labels).item(), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_validation_equals_one_pass_over_everything(batch_size):
    points, classifier = Points(23, noise=3.0), LinearClassifier(3, 7)
    nn.init.normal_(classifier.linear.weight)
    logits = classifier(points.points)
    order = logits.argsort(dim=1, descending=True)
    result = validate(classifier, nn.Identity(), points, CPU, batch_size)
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, points.labels).item(), rel=1e-5)
    for name, top in (("acc1", 1), ("acc5", 5)):
        hits = sum(label in row[:top] for row, label in zip(order.tolist(), points.labels.tolist(), strict=True))
        assert result[name] == pytest.approx(100 * hits / 23)


@pytest.mark.parametrize(("lr", "told"), [(0.1, False), (100.0, True)])
def test_a_finite_loss_far_above_that_of_guessing_is_told(capsys, lr, told):
    """Before, 1e4 stood in the log as any other number."""
    torch.manual_seed(0)
    classifier, points = LinearClassifier(3, 3), Points(60, noise=3.0)
    optimizer = torch.optim.SGD(classifier.parameters(), lr, momentum=0.9)
    for _ in range(3):
        loss = train_one_epoch(classifier, nn.Identity(), points.batches(10), optimizer)
    assert (loss > 2 * math.log(3)) is told
    assert ("far above that of guessing, 1.099: --lr is too large" in capsys.readouterr().out) is told


def test_a_loss_that_diverges_is_an_error():
    classifier = LinearClassifier(3, 3)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=torch.inf)
    with pytest.raises(ValueError, match="try a smaller --lr"):
        train_one_epoch(classifier, nn.Identity(), Points(60).batches(10), optimizer)
