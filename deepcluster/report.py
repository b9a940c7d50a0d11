"""End-of-run report: health rules, clusters as a list and as a picture, curves, and a summary."""

import argparse
import csv
import math
from pathlib import Path

import numpy as np
from torch import Tensor

from shared.evaluation.knn_monitor import KNNMonitor
from shared.images.loading import BadImages, EvalDataset, EvalTransform
from shared.images.sources import ImageSource
from shared.pictures.report import Plot, accuracy_plot, save_curves
from shared.pictures.sheets import AGREE, DIFFER, Tile, save_sheet, to_pixels
from shared.run.health import HealthRule
from shared.run.log import read_log
from shared.run.summary import command, end_of_run

from .clustering import Clusters
from .sampling import cluster_lists

CLUSTERS_SHOWN, IMAGES_SHOWN = 12, 12
THUMBNAIL_PX = 96

# trivial solutions (section 3.3): lines about clusters state ``images``, those about an epoch ``train_loss``
HEALTH_RULES = (
    HealthRule(
        "one cluster",
        lambda line: "images" in line and line["clusters"] == 1,
        "TRIVIAL: all images are in one cluster, so there is nothing to learn: look whether the images differ, lower "
        "--lr, or use Kmeans instead of --clustering PIC.",
    ),
    HealthRule(
        "large cluster",
        lambda line: "images" in line and line["largest_cluster"] > line["images"] / 2,
        "TRIVIAL: the largest cluster holds {largest_cluster} of {images} images, their features hardly differ: lower "
        "--lr, or look at edges instead of colours with --sobel.",
    ),
    HealthRule(
        "empty clusters",
        lambda line: "images" in line and line["clusters"] < line["empty_clusters"],
        "TRIVIAL: only {clusters} clusters have images and {empty_clusters} have none, many features are equal: lower "
        "--nmb_cluster or --lr.",
    ),
    HealthRule(
        "nothing learned",
        lambda line: "train_loss" in line and line["clusters"] > 1 and line["train_loss"] > loss_of_a_guess(line),
        "the loss {train_loss:.3f} is that of a network that knows nothing about {clusters} clusters: raise --lr, or "
        "lower --nmb_cluster so that clusters have more images.",
    ),
)
PLOTS = (
    Plot("Loss on the pseudo-labels", "cross-entropy", {"loss": ""}),
    Plot("Clusters and those before", "NMI", {"nmi_previous": ""}, least_range=0.1),
    Plot("Clusters and true labels", "NMI", {"nmi_labels": ""}, least_range=0.1),
    accuracy_plot("Weighted k-NN of the features"),
)


def loss_of_a_guess(line: dict) -> float:
    """A little less than the cross-entropy of equal scores, in nats."""
    return 0.995 * math.log(line["clusters"])


def save_clusters(source: ImageSource, assignments: Tensor, path: Path) -> Path:
    """Write the cluster of every image as CSV: image, cluster and, where there are classes, class."""
    labelled = source.classes is not None
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "cluster", *(["class"] if labelled else [])])
        for i, number in enumerate(assignments.tolist()):
            writer.writerow([source.path(i), number, *([source.classes[source.label(i)]] if labelled else [])])
    return path


# --- Pictures ---------------------------------------------------------------------------------------------------------


def save_pictures(source: ImageSource, clusters: Clusters, output_dir: Path) -> list[Path]:
    """The clusters and the curves of a run, in ``pictures/`` inside its folder."""
    folder = output_dir / "pictures"
    folder.mkdir(exist_ok=True)
    return [
        save_cluster_sheet(source, clusters, folder / "clusters.png"),
        save_curves(output_dir / "metrics.jsonl", folder / "curves.png", "DeepCluster training", PLOTS),
    ]


def save_cluster_sheet(source: ImageSource, clusters: Clusters, path: Path) -> Path:
    """Images of some clusters, one row each, from the largest cluster to the smallest one."""
    lists = cluster_lists(clusters.assignments.numpy(), clusters.num_clusters)
    by_size = clusters.sizes().argsort(descending=True, stable=True)[: clusters.num_filled]
    rows = [_cluster_row(source, number, lists[number]) for number in _evenly(by_size, CLUSTERS_SHOWN)]
    heading = [f"{len(rows)} of {clusters.num_filled} clusters, from the largest to the smallest"]
    if source.labels is not None:
        heading.append("A green frame: the image is of its cluster's most frequent class, which training never saw.")
    return save_sheet(rows, path, "\n".join(heading), [0.75] * len(rows))


def _evenly(numbers: np.ndarray | Tensor, shown: int) -> list[int]:
    """At most so many of the numbers, evenly spaced."""
    places = np.linspace(0, len(numbers) - 1, min(shown, len(numbers))).round().astype(int)
    return numbers[places].tolist()


def _cluster_row(source: ImageSource, number: int, images: np.ndarray) -> list[Tile]:
    chosen = _evenly(images, IMAGES_SHOWN)
    titles = [f"cluster {number}", f"{len(images)} images"]
    frames = [None] * len(chosen)
    if source.labels is not None:
        label, count = most_frequent(source.labels[images])
        titles.append(f"{100 * count / len(images):.0f} % {source.classes[label]}")
        frames = [AGREE if source.label(i) == label else DIFFER for i in chosen]
    titles = titles[: len(chosen)] + [""] * (len(chosen) - len(titles))
    return [Tile(_thumbnail(source, i), t, frame=f) for i, t, f in zip(chosen, titles, frames, strict=True)]


def _thumbnail(source: ImageSource, index: int) -> np.ndarray:
    """A square of an image, or of another one where it cannot be read."""
    dataset = EvalDataset(source, _square, BadImages(len(source), max_fraction=1))
    return to_pixels(dataset[index][0])


def _square(pixels: np.ndarray) -> Tensor:
    side = min(THUMBNAIL_PX, *pixels.shape[:2])
    return EvalTransform(side, side)(pixels)


# --- Summary ----------------------------------------------------------------------------------------------------------


def most_frequent(labels: np.ndarray) -> tuple[int, int]:
    """The most frequent label, and how often it occurs."""
    counts = np.bincount(labels)
    return int(counts.argmax()), int(counts.max())


def purity(assignments: Tensor, labels: np.ndarray) -> float:
    """Share of the images that are of the most frequent class of their cluster."""
    lists = cluster_lists(assignments.numpy(), int(assignments.max()) + 1)
    return sum(most_frequent(labels[images])[1] for images in lists if len(images)) / len(labels)


def summary(
    args: argparse.Namespace,
    source: ImageSource,
    clusters: Clusters,
    knn: KNNMonitor,
    files: list[Path],
    warnings: list[str],
) -> str:
    """What was learned, where the files are and what to run next, as text for the end of a run.

    Args:
        args: Flags of the run.
        files: The list and the pictures.
        warnings: Sentences of the health rules.
    """
    output_dir = Path(args.output_dir)
    lines = read_log(output_dir / "metrics.jsonl")
    filled = clusters.sizes()[clusters.sizes() > 0]
    learned = [f"{len(filled)} clusters of {int(filled.min())} to {int(filled.max())} images"]
    if agreement := [line["nmi_previous"] for line in lines if "nmi_previous" in line]:
        learned.append(f"NMI with the partition before: {agreement[0]:.3f} at first, {agreement[-1]:.3f} in the end")
    if agreement := [line["nmi_labels"] for line in lines if "nmi_labels" in line]:
        learned.append(
            f"NMI with the true labels: {agreement[0]:.3f} before training, {agreement[-1]:.3f} in the end; "
            f"purity {100 * purity(clusters.assignments, source.labels):.1f} %"
        )
    weights, pictures = output_dir / "checkpoint.pth.tar", output_dir / "pictures"
    layer = {"model": weights, "conv": 3, "data": args.data_path}
    commands = [
        command("activ_retrieval.py", **layer, exp=pictures),
        command("gradient_ascent.py", model=weights, conv=3, exp=pictures),
        "python main.py YOUR_IMAGES --sobel --k 100 --exp YOUR_RUN",
    ]
    if not knn.disabled_reason:
        linear = command("eval_linear.py", **layer, val_path=args.val_path, exp=output_dir / "linear")
        commands.insert(0, linear)
    return end_of_run(output_dir, weights, knn, files, commands, learned, warnings)
