"""Clusters of the images of a training: what the log says of them, signs of trivial solutions, a list, pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.images.loading import BadImages
from shared.images.sources import ImageSource
from shared.images.tables import write_table
from shared.pictures.report import Plot
from shared.pictures.sheets import AGREE, DIFFER, Tile, save_sheet, thumbnail
from shared.run.health import HealthRule

IMAGES_SHOWN = 12  # of a cluster
NMI = {"nmi_previous": "the partition before", "nmi_labels": "the true labels"}
PLOTS = (
    Plot("Clusters and those before", "NMI", {"nmi_previous": ""}, least_range=0.1),
    Plot("Clusters and true labels", "NMI", {"nmi_labels": ""}, least_range=0.1),
)


# --- Log --------------------------------------------------------------------------------------------------------------


def nmi(a: Tensor, b: Tensor) -> float:
    """Normalised mutual information of two partitions (N,), I(A; B) / sqrt(H(A) H(B)): 0 independent, 1 equal."""
    from sklearn.metrics import normalized_mutual_info_score  # a second, which the start of a run need not wait for

    return float(normalized_mutual_info_score(a.numpy(), b.numpy(), average_method="geometric"))


def describe_partition(
    assignments: Tensor, num_clusters: int, previous: Tensor | None, source: ImageSource
) -> dict[str, float]:
    """What the log says about a partition: sizes, and its agreement with the one before and with the true labels.

    Args:
        assignments: Cluster of the first images of ``source``, (N,); -1: none.
    """
    sizes = assignments[assignments >= 0].bincount(minlength=num_clusters)
    line = {
        "clusters": int((sizes > 0).sum()),
        "empty_clusters": int((sizes == 0).sum()),
        "smallest_cluster": int(sizes[sizes > 0].min()),
        "largest_cluster": int(sizes.max()),
    }
    if previous is not None and len(previous) == len(assignments):
        line["nmi_previous"] = nmi(assignments, previous)
    if source.labels is not None:
        line["nmi_labels"] = nmi(assignments, torch.from_numpy(source.labels[: len(assignments)]))
    return line


def tell_agreement(lines: Sequence[Mapping]) -> list[str]:
    """Sentences about the first and the last agreement in the lines of a log."""
    found = {what: [line[key] for line in lines if key in line] for key, what in NMI.items()}
    return [f"NMI with {what}: {v[0]:.3f} at first, {v[-1]:.3f} in the end" for what, v in found.items() if v]


def trivial_solutions(number_flag: str, sobel: str) -> tuple[HealthRule, ...]:
    """Rules for lines of :func:`describe_partition` that state ``images``, too.

    Args:
        number_flag: Of the number of clusters.
        sobel: The flag that turns colours into edges.
    """
    return (
        HealthRule(
            "large cluster",
            lambda line: "images" in line and line["clusters"] > 1 and line["largest_cluster"] > line["images"] / 2,
            "TRIVIAL: the largest cluster holds {largest_cluster} of {images} images, their features hardly differ: "
            f"lower --lr, or look at edges instead of colours with {sobel}.",
        ),
        HealthRule(
            "empty clusters",
            lambda line: "images" in line and line["clusters"] < line["empty_clusters"],
            "TRIVIAL: only {clusters} clusters have images and {empty_clusters} have none, many features are equal: "
            f"lower {number_flag} or --lr.",
        ),
    )


# --- List and pictures ------------------------------------------------------------------------------------------------


def save_list(source: ImageSource, columns: Mapping[str, Tensor], path: Path) -> Path:
    """CSV file with a line for every image: its path, its clusters by column, its class where there are classes."""
    rows = [[source.path(i), *numbers] for i, numbers in enumerate(torch.stack([*columns.values()], dim=1).tolist())]
    heading = ["image", *columns]
    if source.classes is not None:
        heading.append("class")
        rows = [[*row, source.classes[source.label(i)]] for i, row in enumerate(rows)]
    return write_table(path, heading, rows)


def unreadable(folder: Path, source: ImageSource, number: int) -> list[int]:
    """Those of the first ``number`` images in whose places the run in ``folder`` has read others."""
    return [i for i in BadImages(len(source), folder / "bad_images.txt").rows(source) if i < number]


def evenly(values: Sequence, most: int) -> list:
    """At most so many of the values, evenly spaced."""
    return [values[i] for i in np.linspace(0, len(values) - 1, min(len(values), most)).round().astype(int)]


def row_of(source: ImageSource, images: Sequence[int], *titles: str) -> list[Tile]:
    """Some images of a cluster; a green frame where one is of the cluster's most frequent class."""
    chosen = [int(image) for image in evenly(images, IMAGES_SHOWN)]
    tiles, titles = [Tile(thumbnail(source, i)) for i in chosen], [*titles]
    if source.labels is not None:
        counts = np.bincount(source.labels[images])
        titles.append(f"{100 * counts.max() / len(images):.0f} % {source.classes[counts.argmax()]}")
        for tile, i in zip(tiles, chosen, strict=True):
            tile.frame = AGREE if source.label(i) == counts.argmax() else DIFFER
    for tile, title in zip(tiles, titles, strict=False):
        tile.title = title
    return tiles


def save_rows(source: ImageSource, rows: Sequence[Sequence[Tile]], heading: str, path: Path) -> Path:
    """A sheet with a row of :func:`row_of` for each cluster."""
    note = "\nA green frame: the image is of its row's most frequent class, which training never saw."
    return save_sheet(rows, path, heading + (note if source.labels is not None else ""), [0.75] * len(rows))
