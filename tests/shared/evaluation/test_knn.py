import math

import pytest
import torch
import torch.nn.functional as F

from shared.evaluation import knn
from shared.evaluation.knn import knn_accuracies, knn_classify, nearest_neighbours


def clustered(num_samples, num_classes=5, dim=8, noise=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(num_samples) % num_classes
    return centres[labels] + noise * torch.randn(num_samples, dim, generator=generator), labels


def slow_vote(train_features, train_labels, test_features, test_labels, k, temperature, top):
    """Wu et al. 2018, section 3.4, one test image and one neighbour at a time."""
    hits = 0
    for feature, label in zip(test_features, test_labels.tolist(), strict=True):
        cosine = [float(F.cosine_similarity(feature, other, dim=0)) for other in train_features]
        nearest = sorted(range(len(cosine)), key=lambda i: -cosine[i])[:k]
        votes = {}
        for i in nearest:
            voted = int(train_labels[i])
            votes[voted] = votes.get(voted, 0.0) + math.exp(cosine[i] / temperature)
        hits += label in sorted(votes, key=lambda c: -votes[c])[:top]
    return 100 * hits / len(test_labels)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_accuracy_equals_a_loop_over_test_images(k):
    train, test = clustered(60, noise=1.5), clustered(37, noise=1.5, seed=1)
    top1, top5 = knn_classify(*train, *test, k, temperature=0.2)
    assert top1 == pytest.approx(slow_vote(*train, *test, k, 0.2, top=1))
    assert top5 == pytest.approx(slow_vote(*train, *test, k, 0.2, top=min(5, k)))
    assert 30 < top1 < 100


def test_several_k_from_one_search_equal_separate_calls():
    train, test = clustered(60, noise=1.5), clustered(30, noise=1.5, seed=1)
    together = knn_accuracies(*train, *test, ks=[20, 3, 7])
    assert together == {k: knn_classify(*train, *test, k) for k in (20, 3, 7)}


def test_classes_without_a_vote_never_count_as_a_hit():
    features = torch.eye(2).repeat_interleave(3, dim=0)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    # only class 1 is among the two neighbours, yet the true class 0 would be second of two in a full ranking
    assert knn_classify(features, labels, features[-1:], torch.tensor([0]), k=2) == (0, 0)


def test_a_small_temperature_does_not_overflow():
    train, test = clustered(60), clustered(40, seed=1)
    assert knn_classify(*train, *test, 10, temperature=1e-3) == knn_classify(*train, *test, 1)


@pytest.mark.parametrize("k", [1, 5, 33, 400])
@pytest.mark.parametrize("size", [400, 401, 997])
def test_neighbours_equal_those_of_the_full_sorted_product(k, size, monkeypatch):
    monkeypatch.setattr(knn, "DATABASE_BLOCK", 300)  # several blocks, the last one smaller than k
    monkeypatch.setattr(knn, "QUERY_BLOCK", 16)
    generator = torch.Generator().manual_seed(size)
    queries, database = (torch.randn(n, 12, generator=generator) for n in (37, size))
    similarities, indices = nearest_neighbours(queries, database, k)
    expected = (queries @ database.t()).sort(dim=1, descending=True)
    torch.testing.assert_close(similarities, expected.values[:, :k])
    assert torch.equal(indices, expected.indices[:, :k])


@pytest.mark.parametrize("spread", [1.0, 1e-2, 0.0])
def test_screening_in_bfloat16_returns_the_float32_neighbours(spread):
    """Down to features so close (all equal at 0) that bfloat16 cannot order them and float32 searches again."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 32, generator=generator)
    queries, database = (centre + spread * torch.randn(n, 32, generator=generator) for n in (20, 3000))
    queries, database = F.normalize(queries, dim=1), F.normalize(database, dim=1)
    search = knn._ScreenedSearch(database, k=10)
    similarities, indices = search(queries)
    expected, _ = knn._Search(database, k=10)(queries)
    torch.testing.assert_close(similarities, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.einsum("qd,qkd->qk", queries, database[indices]), similarities)


def test_the_screening_bound_rejects_queries_whose_neighbours_are_hidden_by_rounding():
    generator = torch.Generator().manual_seed(0)
    database = F.normalize(torch.randn(3000, 32, generator=generator), dim=1)
    close = F.normalize(torch.ones(3000, 32) + 1e-3 * database, dim=1)
    for rows, share_proven in ((database, 1.0), (close, 0.0)):
        search = knn._ScreenedSearch(rows, k=10)
        rounded = rows[:20].bfloat16()
        screened, _ = search.screen(rounded)
        assert search._proven(rows[:20], rounded, screened).float().mean() == share_proven


def test_bfloat16_mode_agrees_with_float32_on_most_neighbours():
    generator = torch.Generator().manual_seed(0)
    queries, database = (F.normalize(torch.randn(n, 64, generator=generator), dim=1) for n in (50, 2000))
    _, exact = nearest_neighbours(queries, database, k=10)
    similarities, rounded = nearest_neighbours(queries, database, k=10, precision="bf16")
    agreement = (exact[:, :, None] == rounded[:, None, :]).any(dim=2).float().mean()
    assert similarities.dtype == torch.float32
    assert agreement > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 61}, "k=61 neighbours asked of a database of 60"),
        ({"k": 0}, "k=0"),
        ({"k": -5}, "k=-5 is no number of neighbours"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"num_classes": 3}, "labels must lie in 0 .. 2"),
        ({"train_labels": torch.zeros(60, dtype=torch.long)}, "at least two classes"),
        ({"train_labels": torch.arange(59)}, "60 features and 59 labels"),
        ({"test_features": torch.full((40, 8), torch.nan)}, "40 of 40 feature vectors are not finite"),
        ({"train_features": torch.zeros(60, 8)}, "all zeros"),
    ],
)
def test_bad_input_is_one_clear_error(change, message):
    train, test = clustered(60), clustered(40, seed=1)
    names = ("train_features", "train_labels", "test_features", "test_labels")
    arguments = dict(zip(names, (*train, *test), strict=True)) | {"k": 5} | change
    with pytest.raises(ValueError, match=message):
        knn_classify(**arguments)
