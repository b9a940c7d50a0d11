import pytest
import torch
from torch import nn

from shared.evaluation.features import check_features, extract_features
from tests.processes import run_processes

CPU = torch.device("cpu")


class CountingImages(torch.utils.data.Dataset):
    """Image i is filled with i + 1 and has the label 10 * i."""

    def __init__(self, num_images):
        self.num_images = num_images

    def __len__(self):
        return self.num_images

    def __getitem__(self, index):
        return torch.full((3, 2, 2), index + 1.0), 10 * index, index


class PixelSums(nn.Module):
    def __init__(self):
        super().__init__()
        self.images_seen = 0

    def forward(self, images):
        self.images_seen += len(images)
        return images.flatten(1).sum(dim=1, keepdim=True) * torch.tensor([1.0, -1.0])


def extract_on_rank(rank, sizes):
    results = []
    for num_images in sizes:
        model = PixelSums()
        features, labels = extract_features(model, CountingImages(num_images), CPU, batch_size=2)
        results.append((features, labels, model.images_seen))
    return results


@pytest.mark.parametrize("num_workers", [0, 1])
def test_features_come_in_the_order_of_the_data_set(num_workers):
    features, labels = extract_features(PixelSums(), CountingImages(7), CPU, batch_size=3, num_workers=num_workers)
    expected = 12 * torch.arange(1.0, 8.0)
    assert torch.equal(features, torch.stack([expected, -expected], dim=1))
    assert labels.tolist() == [10 * i for i in range(7)]


def test_every_rank_gets_all_features_once_and_computes_its_share():
    """5 images fill two ranks unevenly, 1 image leaves the second rank without one of its own."""
    shares = {5: 3, 6: 3, 1: 1}
    for on_rank in run_processes(extract_on_rank, 2, list(shares)):
        for (num_images, share), (features, labels, images_seen) in zip(shares.items(), on_rank, strict=True):
            alone, alone_labels = extract_features(PixelSums(), CountingImages(num_images), CPU)
            assert torch.equal(features, alone)
            assert torch.equal(labels, alone_labels)
            assert images_seen == share


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_evaluated_in_eval_mode_and_returned_as_it_came(training):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(12)).train(training)
    before = model[2].running_mean.clone()
    features, _ = extract_features(model, CountingImages(4), CPU)
    assert torch.allclose(features, torch.arange(1.0, 5.0)[:, None].expand(4, 12), atol=1e-4)
    assert torch.equal(model[2].running_mean, before)
    assert model.training is training
    assert not features.requires_grad


@pytest.mark.parametrize(("value", "message"), [(0.0, "all zeros"), (torch.nan, "not finite"), (torch.inf, "finite")])
def test_useless_features_are_an_error_that_names_the_sample(value, message):
    features = torch.ones(6, 4)
    features[2] = value
    with pytest.raises(ValueError, match=rf"1 of 6 .* {message}, .* sample 2"):
        check_features(features)
