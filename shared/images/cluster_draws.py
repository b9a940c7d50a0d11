"""Images drawn uniformly over clusters, whatever their sizes."""

import numpy as np


def cluster_lists(assignments: np.ndarray, num_clusters: int) -> list[np.ndarray]:
    """The images of each cluster, in ascending order; empty arrays for empty clusters."""
    order = np.argsort(assignments, kind="stable")
    ends = np.bincount(assignments, minlength=num_clusters).cumsum()
    return np.split(order, ends[:-1])


def draw_uniformly(clusters: list[np.ndarray], num_draws: int, rng: np.random.RandomState) -> np.ndarray:
    """Images such that every cluster that is not empty is drawn equally often, in random order.

    Of each cluster ``floor(num_draws / clusters) + 1`` images are drawn, without repetition where it has more than
    that; the shuffled list is cut to ``num_draws``.

    Args:
        clusters: Images of each cluster.
        num_draws: Length of the result.
        rng: Source of randomness, with numpy's legacy streams.

    Returns:
        Images, int64, (``num_draws``,).
    """
    filled = [images for images in clusters if len(images)]
    each = num_draws // len(filled) + 1
    drawn = np.concatenate([rng.choice(images, each, replace=len(images) <= each) for images in filled])
    rng.shuffle(drawn)
    return drawn[:num_draws].astype(np.int64)


def count_repetitions(images: np.ndarray) -> np.ndarray:
    """How often each element occurs before its place."""
    order = np.argsort(images, kind="stable")
    sorted_images = images[order]
    firsts = np.flatnonzero(np.diff(sorted_images, prepend=-1))
    counts = np.diff(firsts, append=len(images))
    repetitions = np.empty(len(images), dtype=np.int64)
    repetitions[order] = np.arange(len(images)) - firsts.repeat(counts)
    return repetitions
