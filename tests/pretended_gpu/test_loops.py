"""Loops that are no steps of a ``Run``: how often the host waits for the device has nothing to do with their length."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from shared.evaluation import features, linear, voc
from shared.optimisation.precision import Precision
from shared.supervised.evaluation import evaluate_classifier
from tests.pretended_gpu.device import DEVICE, pretended_gpu

BATCH = 2


def images(batches: int) -> TensorDataset:
    """With labels of three classes, and their numbers."""
    numbers = torch.arange(BATCH * batches)
    return TensorDataset(torch.rand(len(numbers), 3, 4, 4), numbers % 3, numbers)


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).to(DEVICE)


def probe(batches: int) -> float:
    classifier = network()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    loaded = [[t.to(DEVICE, non_blocking=True) for t in images(1)[:][:2]] for _ in range(batches)]
    return linear.train_one_epoch(classifier, nn.Identity(), loaded, optimizer)


def learn_voc(steps: int) -> None:
    labels = np.zeros((BATCH, 20), dtype=np.int64)
    batches = ((torch.rand(BATCH, 3, 4, 4, device=DEVICE), torch.arange(BATCH)) for _ in range(steps))
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(48, 20)).to(DEVICE)
    args = SimpleNamespace(lr=0.1, wd=0.0, nit=steps, stepsize=2, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voc, "endless_batches", lambda *_: batches)
        given = SimpleNamespace(labels=labels), None, args, DEVICE, None
        voc.train(classifier, classifier, list(classifier.parameters()), *given)


LOOPS = {
    "features": lambda n: features.extract_features(network(), images(n), DEVICE, BATCH),
    "training a linear classifier": probe,
    "validating it": lambda n: linear.validate(network(), nn.Identity(), images(n), DEVICE, BATCH),
    "validating a network": lambda n: evaluate_classifier(network(), images(n), Precision("bf16", DEVICE), BATCH),
    "training on VOC": learn_voc,
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_host_does_not_wait_for_every_batch(name):
    waits = []
    for batches in (2, 5):
        with pretended_gpu() as watch:
            watch.run = SimpleNamespace(logs_this_step=False)  # all that follows is a step
            LOOPS[name](batches)
        waits.append([wait.line for wait in watch.waits])
    assert waits[0] == waits[1]
