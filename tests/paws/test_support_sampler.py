"""Supports: as many images of every class, never twice in a round, the same after a resume, disjoint on ranks."""

import numpy as np
import pytest

from paws.support_sampler import SupportSampler

LABELS = np.array([i % 6 if i % 7 else -1 for i in range(120)])  # 6 classes, every seventh image has no label


def sampler(steps_per_epoch: int = 10, **options) -> SupportSampler:
    return SupportSampler(LABELS, 3, options.pop("classes_per_batch", 2), steps_per_epoch, **options)


def epoch_of(sampler: SupportSampler, epoch: int, start: int = 0) -> list[list[tuple[int, int]]]:
    sampler.set_epoch(epoch, start)
    return list(sampler)


def test_keys_are_steps_so_views_of_an_image_differ_between_rounds():
    steps = [{step for step, _ in batch} for epoch in (0, 1) for batch in epoch_of(sampler(), epoch)]
    assert steps == [{step} for step in range(20)]


@pytest.mark.parametrize("start", [0, 1, 4, 9])
def test_resuming_inside_an_epoch_gives_the_rest_of_it(start):
    whole = epoch_of(sampler(), 3)
    assert epoch_of(sampler(), 3, start) == whole[start:]  # a sampler that has seen nothing before


def test_the_released_loader_restarts_when_it_is_exhausted():
    """A step by step imitation of one object that is iterated on and on."""
    mine = sampler(steps_per_epoch=4)  # two rounds of 3 in an iteration: longer than an epoch
    assert (mine.batches_per_round, mine.inner_epochs, mine.batches_per_iteration) == (3, 2, 6)
    expected, step, iteration = [], 0, 0
    while step < 20:
        for inner in range(2):
            expected += mine.round(iteration, inner, epoch=step // 4)
            step += 3
        iteration += 1
    found = [[index for _, index in batch] for epoch in range(5) for batch in epoch_of(mine, epoch)]
    assert found == expected[:20]


def test_ranks_share_classes_but_not_images():
    one, two = (epoch_of(sampler(rank=rank, world_size=2), 0) for rank in range(2))
    for a, b in zip(one, two, strict=True):
        a, b = ([index for _, index in batch] for batch in (a, b))
        assert (LABELS[a] == LABELS[b]).all() and not set(a) & set(b)


def test_ranks_with_classes_of_their_own_share_none():
    ranks = [epoch_of(sampler(rank=rank, world_size=3, unique_classes=True), 0) for rank in range(3)]
    for batches in zip(*ranks, strict=True):
        classes = [{LABELS[index] for _, index in batch} for batch in batches]
        assert set.union(*classes) == set(range(6)) and sum(map(len, classes)) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imgs_per_class": 30}, r"class '0' has 1\d labelled image.*--supervised_imgs_per_class 30"),
        ({"imgs_per_class": 10, "world_size": 2}, r"for each of 2 processes; --supervised_imgs_per_class 10"),
        ({"classes_per_batch": 4}, "--classes_per_batch 4 does not divide the 6 classes"),
        ({"classes_per_batch": 7}, "--classes_per_batch 7 is more than the 6 classes"),
        ({"classes_per_batch": 3, "world_size": 3, "unique_classes": True}, "on 3 processes with classes of their own"),
        ({"class_names": ["a", "b", "c", "d", "e", "f", "dog"]}, "class 'dog' has no labelled image"),
        ({"imgs_per_class": 0}, "--supervised_imgs_per_class 0 must be at least 1"),
    ],
)
def test_what_cannot_be_sampled_is_one_clear_error(options, message):
    arguments = {"imgs_per_class": 2, "classes_per_batch": 2, "steps_per_epoch": 5} | options
    with pytest.raises(ValueError, match=message):
        SupportSampler(LABELS, **arguments)
