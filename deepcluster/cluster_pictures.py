"""What the clusters of a run are like: a list, a picture of the images of some of them, their purity."""

import csv
from pathlib import Path

import numpy as np
from torch import Tensor

from shared.images.cluster_draws import cluster_lists
from shared.images.sources import ImageSource
from shared.pictures.sheets import AGREE, DIFFER, Tile, save_sheet, thumbnail

from .clustering import Clusters

CLUSTERS_SHOWN, IMAGES_SHOWN = 12, 12


def save_clusters(source: ImageSource, assignments: Tensor, path: Path) -> Path:
    """Write the cluster of every image as CSV: image, cluster and, where there are classes, class."""
    labelled = source.classes is not None
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "cluster", *(["class"] if labelled else [])])
        for i, number in enumerate(assignments.tolist()):
            writer.writerow([source.path(i), number, *([source.classes[source.label(i)]] if labelled else [])])
    return path


def save_cluster_sheet(source: ImageSource, clusters: Clusters, path: Path) -> Path:
    """Images of some clusters, one row each, from the largest cluster to the smallest one."""
    lists = cluster_lists(clusters.assignments.numpy(), clusters.num_clusters)
    by_size = clusters.sizes().argsort(descending=True, stable=True)[: clusters.num_filled].numpy()
    rows = [_cluster_row(source, number, lists[number]) for number in _evenly(by_size, CLUSTERS_SHOWN)]
    heading = [f"{len(rows)} of {clusters.num_filled} clusters, from the largest to the smallest"]
    if source.labels is not None:
        heading.append("A green frame: the image is of its cluster's most frequent class, which training never saw.")
    return save_sheet(rows, path, "\n".join(heading), [0.75] * len(rows))


def _evenly(numbers: np.ndarray, shown: int) -> list[int]:
    """At most so many of the numbers, evenly spaced."""
    return numbers[np.linspace(0, len(numbers) - 1, min(shown, len(numbers))).round().astype(int)].tolist()


def _cluster_row(source: ImageSource, number: int, images: np.ndarray) -> list[Tile]:
    chosen = _evenly(images, IMAGES_SHOWN)
    row = [Tile(thumbnail(source, i)) for i in chosen]
    titles = [f"cluster {number}", f"{len(images)} images"]
    if source.labels is not None:
        label, count = most_frequent(source.labels[images])
        titles.append(f"{100 * count / len(images):.0f} % {source.classes[label]}")
        for tile, i in zip(row, chosen, strict=True):
            tile.frame = AGREE if source.label(i) == label else DIFFER
    for tile, title in zip(row, titles, strict=False):
        tile.title = title
    return row


def most_frequent(labels: np.ndarray) -> tuple[int, int]:
    """The most frequent label, and how often it occurs."""
    counts = np.bincount(labels)
    return int(counts.argmax()), int(counts.max())


def purity(assignments: Tensor, labels: np.ndarray) -> float:
    """Share of the images that are of the most frequent class of their cluster."""
    lists = cluster_lists(assignments.numpy(), int(assignments.max()) + 1)
    return sum(most_frequent(labels[images])[1] for images in lists if len(images)) / len(labels)
