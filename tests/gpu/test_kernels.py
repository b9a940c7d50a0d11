"""The mechanisms that methods share give on a GPU what they give on a CPU."""

import pytest
import torch
import torch.nn.functional as F

from deepcluster.clustering import kmeans_torch
from shared.evaluation.knn import knn_accuracies, nearest_neighbours
from shared.sinkhorn import sinkhorn_knopp
from swav.kmeans import spherical_kmeans


def random_features(count: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("scale", [1, 100])  # the second leaves the range of float32
@pytest.mark.parametrize("num_iters", [0, 3, 50])
def test_sinkhorn(scale, num_iters):
    scores = scale * torch.randn(256, 128, generator=torch.Generator().manual_seed(0)) / 4
    expected = sinkhorn_knopp(scores, num_iters=num_iters)
    torch.testing.assert_close(sinkhorn_knopp(scores.cuda(), num_iters=num_iters).cpu(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nearest_neighbours(precision):
    database, queries = random_features(20_000, 64, seed=0), random_features(500, 64, seed=1)
    exact = queries.double() @ database.double().T
    similarities, indices = nearest_neighbours(queries.cuda(), database.cuda(), 20, precision=precision)
    found = exact.gather(1, indices.cpu())
    best = exact.topk(20, dim=1).values
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    torch.testing.assert_close(found, best, rtol=0, atol=tolerance)
    torch.testing.assert_close(similarities.cpu().double(), best, rtol=0, atol=tolerance)


def test_knn_classification():
    centres = random_features(10, 32, seed=0)
    labels = torch.arange(2000) % 10
    features = centres[labels] + 0.3 * random_features(2000, 32, seed=1)
    half = (features[:1000], labels[:1000], features[1000:], labels[1000:])
    expected = knn_accuracies(*half, ks=[1, 20])
    found = knn_accuracies(*(value.cuda() for value in half), ks=[1, 20])
    assert found == {k: pytest.approx(values, abs=0.1) for k, values in expected.items()}


def test_kmeans_is_that_of_a_cpu_and_the_same_every_time():
    features = 5 * random_features(20, 16, seed=0)[torch.arange(4000) % 20] + random_features(4000, 16, seed=1)
    expected = kmeans_torch(features, features[:20].clone())
    runs = [kmeans_torch(features.cuda(), features[:20].cuda()) for _ in range(3)]
    assert (runs[0].assignments.cpu() == expected.assignments).float().mean() > 0.999
    assert all(torch.equal(run.centroids, runs[0].centroids) for run in runs)


def test_spherical_kmeans_is_that_of_a_cpu_and_the_same_every_time():
    features = random_features(20_000, 64, seed=0)
    assignments, centroids = spherical_kmeans(features, features[:50].clone())
    runs = [spherical_kmeans(features.cuda(), features[:50].cuda()) for _ in range(5)]
    torch.testing.assert_close(runs[0][1].cpu(), centroids, rtol=1e-2, atol=1e-2)
    assert (runs[0][0].cpu() == assignments).float().mean() > 0.99
    assert all(torch.equal(run[1], runs[0][1]) for run in runs)
