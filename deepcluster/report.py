"""What a run leaves for a person to look at: a list and a picture of the clusters, curves, and a summary."""

import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.evaluation.knn_monitor import KNNMonitor
from shared.images.loading import BadImages, EvalDataset, EvalTransform
from shared.images.sources import ImageSource
from shared.pictures.curves import Curve, Panel, save_panels
from shared.pictures.sheets import AGREE, DIFFER, Tile, save_sheet, to_pixels
from shared.run.log import read_log
from shared.run.summary import command, end_of_run

from .clustering import Clusters
from .sampling import cluster_lists

CLUSTERS_SHOWN, IMAGES_SHOWN = 12, 12
THUMBNAIL_PX = 96


def save_clusters(source: ImageSource, assignments: Tensor, path: Path) -> Path:
    """Write the cluster of every image as CSV: image, cluster and, where there are classes, class."""
    labelled = source.classes is not None
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "cluster", *(["class"] if labelled else [])])
        for i, number in enumerate(assignments.tolist()):
            writer.writerow([source.path(i), number, *([source.classes[source.label(i)]] if labelled else [])])
    return path


def save_pictures(source: ImageSource, clusters: Clusters, output_dir: Path) -> list[Path]:
    """The clusters and the curves of a run, in ``pictures/`` inside its folder."""
    folder = output_dir / "pictures"
    folder.mkdir(exist_ok=True)
    return [
        save_cluster_sheet(source, clusters, folder / "clusters.png"),
        save_curves(output_dir / "metrics.jsonl", folder / "curves.png"),
    ]


def save_cluster_sheet(source: ImageSource, clusters: Clusters, path: Path) -> Path:
    """Images of some clusters, one row each, from the largest cluster to the smallest one."""
    lists = [images for images in cluster_lists(clusters.assignments.numpy(), clusters.num_clusters) if len(images)]
    numbers = torch.nonzero(clusters.sizes())[:, 0].tolist()
    by_size = np.argsort([-len(images) for images in lists], kind="stable")
    rows = [
        _cluster_row(source, numbers[i], lists[i])
        for i in by_size[_evenly(len(lists), CLUSTERS_SHOWN)]
    ]  # fmt: skip
    heading = [f"{len(rows)} of {len(lists)} clusters, from the largest to the smallest"]
    if source.labels is not None:
        heading.append("A green frame: the image is of its cluster's most frequent class, which training never saw.")
    return save_sheet(rows, path, "\n".join(heading), [0.75] * len(rows))


def _evenly(count: int, shown: int) -> np.ndarray:
    """At most ``shown`` of the indices below ``count``, evenly spaced."""
    return np.linspace(0, count - 1, min(shown, count)).round().astype(int)


def _cluster_row(source: ImageSource, number: int, images: np.ndarray) -> list[Tile]:
    chosen = images[_evenly(len(images), IMAGES_SHOWN)].tolist()
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


def most_frequent(labels: np.ndarray) -> tuple[int, int]:
    """The most frequent label, and how often it occurs."""
    counts = np.bincount(labels)
    return int(counts.argmax()), int(counts.max())


def purity(assignments: Tensor, labels: np.ndarray) -> float:
    """Share of the images that are of the most frequent class of their cluster."""
    lists = cluster_lists(assignments.numpy(), int(assignments.max()) + 1)
    return sum(most_frequent(labels[images])[1] for images in lists if len(images)) / len(labels)


def save_curves(log_path: Path, path: Path) -> Path:
    """The loss, the agreement of partitions, and the k-NN accuracy over a run.

    Args:
        log_path: ``metrics.jsonl`` of a run.
        path: PNG file to write.
    """
    lines = read_log(log_path)
    training = [line for line in lines if "loss" in line]
    loss = Curve([line["step"] for line in training], [line["loss"] for line in training])
    panels = [Panel("Loss on the pseudo-labels", "step", "cross-entropy", [loss])]
    agreements = [
        Curve([line["epoch"] for line in lines if key in line], [line[key] for line in lines if key in line], label)
        for key, label in (("nmi_previous", "with the partition before"), ("nmi_labels", "with the true labels"))
    ]
    if agreements := [curve for curve in agreements if curve.x]:
        panels.append(Panel("Agreement of the clusters", "epoch", "NMI", agreements, least_range=0.1))
    evaluations = [line for line in lines if "knn_top1" in line]
    if evaluations:
        curve = Curve([x["step"] for x in evaluations], [x["knn_top1"] for x in evaluations], style="points")
        panels.append(Panel("Weighted k-NN of the features", "step", "top-1 accuracy (%)", [curve], least_range=10))
    return save_panels(panels, path, "DeepCluster training")


def summary(
    output_dir: Path,
    data_path: str | None,
    val_path: str | None,
    source: ImageSource,
    clusters: Clusters,
    knn: KNNMonitor,
    files: list[Path],
    problems: list[str],
) -> str:
    """What was learned, where the files are and what to run next, as text for the end of a run.

    Args:
        files: The list and the pictures.
        problems: Sentences about trivial solutions.
    """
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
    weights = output_dir / "checkpoint.pth.tar"
    commands = []
    if not knn.disabled_reason:
        linear = {"model": weights, "conv": 3, "data": data_path, "val_path": val_path, "exp": output_dir / "linear"}
        commands.append(command("eval_linear.py", **linear))
    commands += [
        command("activ_retrieval.py", model=weights, conv=3, data=data_path, exp=output_dir / "pictures"),
        command("gradient_ascent.py", model=weights, conv=3, exp=output_dir / "pictures"),
        "python main.py YOUR_IMAGES --sobel --k 100 --exp YOUR_RUN",
    ]
    return end_of_run(output_dir, weights, knn, files, commands, learned, problems)
