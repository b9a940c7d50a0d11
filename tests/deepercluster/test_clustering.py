"""Groups, k-means in two levels, and batches of the clusters, beside slow loops and on several processes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepercluster.clustering import (
    Clusters,
    GroupBatches,
    Groups,
    Layout,
    Whitening,
    epoch_sizes,
    exchange_rows,
    find_clusters,
    kmeans,
)
from tests.processes import run_processes


def blobs(number: int, dim: int, centres: int, seed: int = 0) -> torch.Tensor:
    """Unit vectors around some directions, which take turns."""
    generator = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(centres, dim, generator=generator)
    return F.normalize(means[torch.arange(number) % centres] + torch.randn(number, dim, generator=generator), dim=1)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_fewer_processes_take_the_places_of_all(world_size):
    layout, recipe = Layout(world_size, 8, True), Layout(8, 8, True)
    places = [place for rank in range(world_size) for place in layout.of_rank(rank)]
    assert places == [recipe.place(number) for number in range(8)]
    assert sorted(p.super_class for p in places) == list(range(8))
    assert all(p.super_class == 4 * p.super_cluster + p.rotation for p in places)


@pytest.mark.parametrize(
    ("world_size", "super_classes", "message"),
    [
        (3, 8, "--super_classes 8: 3 processes are neither a multiple nor a divisor"),
        (4, 12, "neither a multiple nor a divisor of it and of its 3 super-clusters"),
        (1, 6, "--super_classes 6: with --rotnet it is four times"),
    ],
)
def test_processes_that_cannot_share_are_refused(world_size, super_classes, message):
    with pytest.raises(ValueError, match=message):
        Layout(world_size, super_classes, True)


def test_kmeans_is_lloyds_loop():
    rows = blobs(80, 5, 4)
    start = rows[torch.arange(6)]
    labels, centroids = kmeans(rows, start, 5)
    slow = start.double()
    for iteration in range(6):
        nearest = [min(range(6), key=lambda k: float((row - slow[k]).square().sum())) for row in rows.double()]
        if iteration < 5:
            for k in range(6):
                mine = [i for i, label in enumerate(nearest) if label == k]
                slow[k] = rows.double()[mine].mean(dim=0)
    assert labels.tolist() == nearest
    torch.testing.assert_close(centroids.double(), slow, rtol=0, atol=1e-5)


def test_no_cluster_stays_empty_but_of_equal_rows():
    rows = blobs(60, 6, 3)
    start = torch.cat([rows[:2], torch.full((8, 6), -5.0)])
    labels, centroids = kmeans(rows, start, 0)
    assert labels.bincount(minlength=10).min() > 0 and centroids.isfinite().all()
    labels, centroids = kmeans(rows, start, 4)
    assert labels.bincount(minlength=10).min() > 0
    labels, _ = kmeans(rows[:1].repeat(20, 1), start, 2)
    assert labels.unique().tolist() == [0]


def test_whitened_components_are_uncorrelated_and_too_many_are_refused():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) @ torch.randn(6, 6)
    whitening = Whitening.fit(x, 4)
    components = (x - whitening.mean) @ whitening.matrix
    torch.testing.assert_close(components.t() @ components / 200, torch.eye(4), rtol=0, atol=1e-3)
    equal = torch.full((9, 6), 0.1) + 1e-8 * torch.randn(9, 6)
    assert not Whitening.fit(equal, 4)(equal).any()
    for rows, dim in ((x, 7), (x[:3], 4)):
        with pytest.raises(ValueError, match=f"--dim_pca {dim}: {len(rows)} features of 6 dimensions"):
            Whitening.fit(rows, dim)


def clusters_of_rank(rank: int, world_size: int, rows: torch.Tensor, k: int, released: int | None) -> list:
    groups = Groups(Layout(world_size, 8, True))
    found = find_clusters(rows[rank::world_size], len(rows), groups, k, 4, 0, len(rows), released)
    return [found.super_clusters, found.sub_clusters]


def test_two_levels_are_kmeans_of_the_rows_of_each_super_cluster():
    rows = blobs(240, 8, 12)
    supers, subs = clusters_of_rank(0, 1, rows, 12, None)
    start = torch.from_numpy(np.random.RandomState(0).choice(len(rows), 2, replace=False))
    expected, _ = kmeans(rows, rows[start], 4)
    assert torch.equal(supers, expected)
    for s in (0, 1):
        mine = (supers == s).nonzero().flatten()
        chosen = np.random.RandomState(1 + s).choice(len(mine), 6, replace=False)
        assert torch.equal(subs[mine], kmeans(rows[mine], rows[mine][torch.from_numpy(chosen)], 4)[0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_groups_of_processes_find_the_clusters_of_one(world_size):
    rows = blobs(241, 8, 12)
    expected = clusters_of_rank(0, 1, rows, 12, None)
    for found in run_processes(clusters_of_rank, world_size, world_size, rows, 12, None):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_leftover_images_are_in_no_sub_cluster_by_the_released_rules():
    supers, subs = clusters_of_rank(0, 1, blobs(241, 8, 12), 12, 4)
    for s in (0, 1):
        mine = subs[supers == s]
        whole = len(mine) // 16 * 16  # four places of four images
        assert (mine[:whole] >= 0).all() and (mine[whole:] == -1).all()


def rows_of_rank(rank: int, wanted: list) -> torch.Tensor:
    rows = torch.arange(10.0)[rank::2, None] * torch.ones(1, 3)
    return exchange_rows(rows, wanted)


def test_rows_come_in_the_order_in_which_they_are_wanted():
    wanted = [torch.tensor([0, 1, 4, 7]), torch.tensor([9, 2, 3])]
    found = run_processes(rows_of_rank, 2, wanted)
    assert [part[:, 0].tolist() for part in found] == [images.tolist() for images in wanted]


# --- Batches ----------------------------------------------------------------------------------------------------------


def some_clusters() -> Clusters:
    supers = torch.arange(60) % 2
    subs = torch.where(torch.arange(60) < 40, 0, torch.arange(60) // 2 % 3)
    subs[5] = -1
    return Clusters(supers, subs, 2, 3)


def batches_of(layout: Layout, rank: int = 0, shown: int = 16, batch_size: int = 4) -> GroupBatches:
    batches = GroupBatches(layout.of_rank(rank), layout.training_size, shown, batch_size, seed=3)
    batches.set_epoch(1, some_clusters())
    return batches


def test_a_batch_has_images_of_each_place_drawn_uniformly_over_its_sub_clusters():
    clusters, batches = some_clusters(), batches_of(Layout(1, 8, True), shown=30, batch_size=10)
    assert len(batches) == 3 == len(list(batches))
    drawn = {place.super_class: batches.draw(place) for place in batches.places}
    for place in batches.places:
        images = torch.tensor([image for _, image in drawn[place.super_class]])
        assert (clusters.super_clusters[images] == place.super_cluster).all() and 5 not in images
        counts = clusters.sub_clusters[images].bincount(minlength=3)
        assert counts.sum() == 30 and counts.max() <= 11  # 11 of each are drawn, three of the 33 are left out
        assert len(set(drawn[place.super_class])) == 30  # an image drawn twice is seen in two views
    first = next(iter(batches))
    assert first == [key for place in batches.places for key in drawn[place.super_class][:10]]


def test_processes_share_the_images_that_one_process_draws():
    whole = list(batches_of(Layout(1, 8, True)))
    parts = [list(batches_of(Layout(4, 8, True), rank)) for rank in range(4)]
    assert [[key for part in step for key in part] for step in zip(*parts, strict=True)] == whole
    of_group = [batches_of(Layout(16, 8, True), rank, batch_size=2) for rank in (0, 1)]
    keys = [batches.draw(batches.places[0]) for batches in of_group]
    assert [key for pair in zip(*keys, strict=True) for key in pair] == batches_of(Layout(1, 8, True)).draw(
        Layout(1, 8, True).place(0)
    )


def test_a_resumed_epoch_goes_on_with_the_next_batch():
    batches = batches_of(Layout(1, 8, True))
    whole = list(batches)
    batches.set_epoch(1, some_clusters(), start_step=2)
    assert list(batches) == whole[2:]
    batches.set_epoch(2, some_clusters())
    assert list(batches) != whole


def test_an_epoch_without_a_batch_is_refused():
    assert epoch_sizes(100, 4, Layout(1, 4, True), released=False) == (100, 24)
    with pytest.raises(ValueError, match="--batch_size 30: an epoch shows each of 4 super-classes 25 of 100 images"):
        epoch_sizes(100, 30, Layout(1, 4, True), released=False)
