import numpy as np

from deepcluster.sampling import DrawnBatches, draw_epoch
from shared.images.cluster_draws import cluster_lists

ASSIGNMENTS = np.random.default_rng(0).choice(6, size=500, p=[0.6, 0.2, 0.1, 0.05, 0.05, 0])  # cluster 5 is empty


def shares(images):
    return np.bincount(ASSIGNMENTS[images], minlength=6) / len(images)


def test_every_cluster_is_drawn_equally_often_whatever_its_size():
    drawn = draw_epoch(cluster_lists(ASSIGNMENTS, 6), 500, seed=1, sampler="uniform")
    np.testing.assert_allclose(shares(drawn), [0.2, 0.2, 0.2, 0.2, 0.2, 0], atol=0.005)


def test_the_released_sampler_draws_large_clusters_more_often():
    drawn = draw_epoch(cluster_lists(ASSIGNMENTS, 6), 500, seed=1, sampler="official")
    assert shares(drawn)[0] > 0.4
    assert len(drawn) == 500


def test_a_draw_is_a_function_of_its_seed():
    lists = cluster_lists(ASSIGNMENTS, 6)
    one, same, other = (draw_epoch(lists, 100, seed, "uniform") for seed in (2**70 + 3, 2**70 + 3, 4))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def batches_of(images, batch_size, rank=0, world_size=1, start_step=0, epoch=0):
    batches = DrawnBatches.__new__(DrawnBatches)
    batches.rank, batches.world_size = rank, world_size
    batches.num_draws, batches.batch_size = len(images), batch_size
    batches.set_epoch(epoch, images, start_step)
    return list(batches)


def test_processes_share_out_each_batch():
    images = np.random.default_rng(0).integers(0, 20, size=50)
    whole = batches_of(images, 8)
    parts = [batches_of(images, 8, rank, 2) for rank in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == 7
    for batch, *of_ranks in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(key for keys in of_ranks for key in keys)


def test_a_batch_without_an_image_for_every_process_is_left_out():
    images = np.arange(17)
    assert len(batches_of(images, 8)) == 3
    assert [len(batch) for batch in batches_of(images, 8, 1, 2)] == [4, 4]


def test_a_resumed_epoch_goes_on_with_the_same_keys():
    images = np.random.default_rng(0).integers(0, 20, size=50)
    assert batches_of(images, 8, start_step=3) == batches_of(images, 8)[3:]


def test_an_image_drawn_twice_has_two_keys_and_another_epoch_has_others():
    images = np.array([5, 5, 7, 5])
    keys = [key for batch in batches_of(images, 2) for key in batch]
    assert [image for _, image in keys] == images.tolist()
    assert len(set(keys)) == 4
    assert not set(keys) & {key for batch in batches_of(images, 2, epoch=1) for key in batch}
