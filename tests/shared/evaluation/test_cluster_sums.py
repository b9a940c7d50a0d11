import pytest
import torch

from shared.evaluation import cluster_sums
from shared.evaluation.cluster_sums import nearest, sum_by_cluster, sum_by_cluster_on_cpu


@pytest.mark.parametrize("block", [1, 7, 1 << 18])
def test_the_nearest_centroid_is_that_of_a_loop_whatever_the_blocks(monkeypatch, block):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-3, 4, (50, 3), generator=generator).double()  # products without rounding
    centroids = torch.randint(-3, 4, (6, 3), generator=generator).double()
    centroids[5] = centroids[2]  # a tie of all rows
    monkeypatch.setattr(cluster_sums, "BLOCK_SCORES_ON_CPU", block)
    by_product, score = nearest(rows, centroids)
    by_distance, _ = nearest(rows, centroids, centroids.square().sum(dim=1) / -2)
    for i, row in enumerate(rows):
        products = [float(row @ centroid) for centroid in centroids]
        distances = [float((row - centroid).square().sum()) for centroid in centroids]
        assert (by_product[i], score[i]) == (products.index(max(products)), max(products))
        assert by_distance[i] == distances.index(min(distances))
    empty, of_none = nearest(rows[:0], centroids)
    assert empty.dtype == torch.long and empty.shape == of_none.shape == (0,)


def test_sums_equal_a_loop_over_rows_whatever_the_blocks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows, numbers = torch.randn(50, 3, generator=generator), torch.randint(6, (50,), generator=generator)
    numbers[numbers == 4] = 5  # an empty cluster
    expected = torch.zeros(6, 3, dtype=torch.double)
    for row, number in zip(rows, numbers, strict=True):
        expected[number] += row.double()
    for block_rows in (7, 50, 1000):
        monkeypatch.setattr(cluster_sums, "BLOCK_ROWS", block_rows)
        found = sum_by_cluster(rows, numbers, 6)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(sum_by_cluster_on_cpu(rows, numbers, 6), expected, rtol=1e-5, atol=1e-5)
        in_float32 = sum_by_cluster(rows, numbers, 6, torch.float32)
        torch.testing.assert_close(in_float32, expected.float(), rtol=1e-5, atol=1e-5)
    assert not found[4].any() and not torch.are_deterministic_algorithms_enabled()
