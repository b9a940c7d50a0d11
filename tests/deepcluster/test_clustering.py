import collections
import decimal
from decimal import Decimal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepcluster import clustering
from deepcluster.clustering import (
    check_clustering,
    cluster,
    gather_rows,
    kmeans_faiss,
    kmeans_torch,
    neighbour_graph,
    pca_whiten,
    power_iteration_clustering,
    split_empty_clusters,
)
from tests.processes import run_processes


def blobs(num_clusters=6, each=40, dim=10, noise=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(num_clusters, dim, generator=generator), dim=1)
    labels = torch.arange(num_clusters).repeat_interleave(each)
    return F.normalize(centres[labels] + noise * torch.randn(len(labels), dim, generator=generator), dim=1), labels


# --- PCA --------------------------------------------------------------------------------------------------------------


def features_of_some_rank(rows=300, dim=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator) @ torch.randn(dim, dim, generator=generator) + 3


def test_rows_in_portions_give_the_same_components(monkeypatch):
    whole, _ = pca_whiten(features_of_some_rank(), 5)
    monkeypatch.setattr(clustering, "BLOCK_ROWS", 7)
    torch.testing.assert_close(pca_whiten(features_of_some_rank(), 5)[0], whole, atol=1e-4, rtol=0)


def test_directions_without_variance_do_not_become_features():
    features = features_of_some_rank(dim=20)
    flat = torch.cat([features[:, :4], torch.ones(300, 16)], dim=1)
    whitened, with_variance = pca_whiten(flat, 10)
    assert with_variance == 4
    assert whitened[:, 4:].abs().max() == 0 and whitened.isfinite().all()
    assert pca_whiten(torch.ones(30, 8), 3)[1] == 0


def whiten_share(rank, features, dim):
    whitened, _ = pca_whiten(features[rank::2], dim)
    rows = gather_rows(whitened, len(features))
    assert (rows is None) == (rank == 1)
    return rows


def test_two_processes_whiten_like_one():
    features = features_of_some_rank(rows=101)
    expected, _ = pca_whiten(features, 6)
    found, _ = run_processes(whiten_share, 2, features, 6)
    torch.testing.assert_close(found @ found.t(), expected @ expected.t(), atol=1e-4, rtol=0)


# --- k-means ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_torch_and_faiss_treat_empty_clusters_alike(seed, iterations):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2000, 4, generator=generator)
    far = 50 + torch.arange(5.0)[:, None].expand(5, 4)  # nobody's nearest centroids
    start = torch.cat([features[:40], far])[torch.randperm(45, generator=generator)]
    ours, theirs = kmeans_torch(features, start, iterations), kmeans_faiss(features, start, iterations)
    assert (ours.assignments == theirs.assignments).float().mean() > 0.99
    torch.testing.assert_close(ours.centroids, theirs.centroids, atol=1e-3, rtol=0)


def test_an_empty_cluster_gets_a_copy_of_a_large_one_and_never_of_a_single_image():
    centroids, counts = torch.arange(8.0).view(4, 2) + 1, torch.tensor([1, 0, 30, 0])
    given = centroids.clone()
    split_empty_clusters(centroids, counts, num_rows=31)
    assert torch.equal(centroids[0], given[0])
    for taker in (1, 3):
        torch.testing.assert_close(centroids[taker], given[2], rtol=3e-3, atol=0)
        assert not torch.equal(centroids[taker], centroids[2])


def test_as_many_clusters_as_images_and_equal_images_come_to_an_end():
    features = F.normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    assert cluster(features, "Kmeans", 12, seed=0, backend="torch").num_filled == 12
    for backend in ("torch", "faiss"):
        equal = cluster(features[:1].expand(12, 5).contiguous(), "Kmeans", 4, seed=0, backend=backend)
        assert equal.assignments.shape == (12,) and equal.loss == pytest.approx(0, abs=1e-5)


def test_without_faiss_torch_is_taken_and_faiss_is_an_error(monkeypatch):
    features, _ = blobs()
    expected = cluster(features, "Kmeans", 6, seed=1, backend="torch")
    monkeypatch.setattr(clustering, "faiss", None)
    assert torch.equal(cluster(features, "Kmeans", 6, seed=1).assignments, expected.assignments)
    with pytest.raises(ValueError, match="--kmeans faiss: faiss is not installed"):
        cluster(features, "Kmeans", 6, seed=1, backend="faiss")


def cluster_on(rank, features, algorithm, num_clusters, backend):
    found = cluster(features[rank::2], algorithm, num_clusters, seed=0, backend=backend)
    return {"assignments": found.assignments, "loss": found.loss}


@pytest.mark.parametrize(
    ("algorithm", "num_clusters", "backend"),
    [("Kmeans", 3, "faiss"), ("Kmeans", 3, "torch"), ("Kmeans", 60, "torch"), ("PIC", 0, "auto")],
)
def test_two_processes_cluster_like_one(algorithm, num_clusters, backend):
    features, _ = blobs(each=21, noise=0.2)
    features = features[:-1]  # 125 rows: the second process has one less
    features[30:80] = features[30]  # so that of 60 clusters some are empty
    one, two = run_processes(cluster_on, 2, features, algorithm, num_clusters, backend)
    assert torch.equal(one["assignments"], two["assignments"]) and one["loss"] == two["loss"]
    whole = cluster(features, algorithm, num_clusters, seed=0, backend=backend)
    assert torch.equal(one["assignments"], whole.assignments)
    assert one["loss"] == pytest.approx(whole.loss, rel=1e-6)


# --- Power iteration clustering ---------------------------------------------------------------------------------------


def exact_pic(features, num_neighbours, sigma, alpha):
    """The algorithm with loops and 60 digits, without the treatment of singletons."""
    with decimal.localcontext(decimal.Context(prec=60)):
        x = features.double().numpy()
        n, sigma, alpha = len(x), Decimal(sigma), Decimal(alpha)
        weights = [collections.Counter() for _ in range(n)]
        for i in range(n):
            distances = ((x - x[i]) ** 2).sum(axis=1)
            distances[i] = np.inf
            for j in distances.argsort()[:num_neighbours].tolist():
                affinity = (-Decimal(distances[j]) / sigma**2).exp()
                weights[i][j] += affinity
                weights[j][i] += affinity
        v = [Decimal(1) / n] * n
        for _ in range(200):
            v = [alpha * sum(w * v[j] for j, w in row.items()) + (1 - alpha) / n for row in weights]
            total = sum(v)
            v = [share / total for share in v]
        summits = []
        for i in range(n):
            while True:
                gain, steepest = max((w * (v[j] - v[i]), j) for j, w in weights[i].items())
                if gain <= 0:
                    break
                i = steepest
            summits.append(i)
    return np.unique(summits, return_inverse=True)[1]


@pytest.mark.parametrize("seed", range(3))
def test_power_iteration_clustering_is_the_algorithm(seed):
    features, _ = blobs(8, each=8, noise=0.2, seed=seed)
    found = power_iteration_clustering(features, 4, 0.5, 0.1, merge_singletons=False)
    assert np.array_equal(found.numpy(), exact_pic(features, 4, 0.5, 0.1))


@pytest.mark.parametrize("dim", [16, 64, 256])
def test_clusters_of_far_apart_vectors_are_not_decided_by_rounding(dim):
    """At the defaults alpha exp(-d^2 / sigma^2) of whitened unit vectors is less than the rounding of 1."""
    features = F.normalize(torch.randn(200, dim, generator=torch.Generator().manual_seed(dim)), dim=1)
    found = power_iteration_clustering(features, merge_singletons=False)
    assert np.array_equal(found.numpy(), exact_pic(features, 5, 0.2, 0.001))


def test_an_image_alone_joins_its_nearest_neighbours_cluster():
    neighbours = np.array([[1, 2], [0, 2], [0, 1], [4, 0], [3, 0]])
    merged = clustering._merge_singletons(np.array([0, 0, 0, 1, 2]), neighbours)
    assert merged.tolist() == [0, 0, 0, 0, 0]  # 3 and 4 are each other's nearest, but both are alone
    alone = clustering._merge_singletons(np.array([0, 0, 0, 1, 2]), np.array([[1], [0], [0], [4], [3]]))
    assert alone.tolist() == [0, 0, 0, 1, 2]


def test_an_image_is_not_its_own_neighbour_even_among_duplicates():
    features = F.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    neighbours, _ = neighbour_graph(features.repeat(4, 1), 2)
    assert not (neighbours == np.arange(20)[:, None]).any()


def test_the_advised_number_of_clusters_is_one_that_the_flag_takes():
    with pytest.raises(ValueError, match=r"take --nmb_cluster 2$"):
        check_clustering(12, "Kmeans", 13)
