"""What a clustering is like, and the end-of-run report: super- and sub-classes as a list, sheets and folders."""

import csv
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.evaluation.knn_monitor import KNNMonitor
from shared.images.loading import BadImages
from shared.images.sources import ImageSource
from shared.pictures.report import Plot, Report, accuracy_plot
from shared.pictures.sheets import AGREE, DIFFER, Tile, link_images, save_sheet, thumbnail
from shared.run.health import HealthRule
from shared.run.run import Run
from shared.run.summary import command, next_command

from .clustering import Clusters, Layout

IMAGES_SHOWN, SUB_SHOWN, SHEETS = 12, 12, 32  # of a row, rows of a sheet, sheets of super-clusters
HEALTH_RULES = (
    HealthRule(
        "large cluster",
        lambda line: "images" in line and line["clusters"] > 1 and line["largest_cluster"] > line["images"] / 2,
        "TRIVIAL: the largest cluster holds {largest_cluster} of {images} images, their features hardly differ: lower "
        "--lr, or look at edges instead of colours with --sobel true.",
    ),
    HealthRule(
        "empty clusters",
        lambda line: "images" in line and line["clusters"] < line["empty_clusters"],
        "TRIVIAL: only {clusters} clusters have images and {empty_clusters} have none, many features are equal: lower "
        "--k or --lr.",
    ),
)
PLOTS = (
    Plot("Loss of super- and sub-classes", "cross-entropy", {"loss_super_class": "super", "loss_sub_class": "sub"}),
    Plot("Right predictions", "%", {"prec_super_class": "super-class", "prec_sub_class": "sub-class", "prec": "both"}),
    Plot("Clusters and those before", "NMI", {"nmi_previous": ""}, least_range=0.1),
    Plot("Clusters and true labels", "NMI", {"nmi_labels": ""}, least_range=0.1),
    accuracy_plot("Weighted k-NN of the features"),
)


def nmi(a: Tensor, b: Tensor) -> float:
    """Normalised mutual information of two partitions (N,), with the geometric mean."""
    from sklearn.metrics import normalized_mutual_info_score  # a second, which the start of a run need not wait for

    return float(normalized_mutual_info_score(a.numpy(), b.numpy(), average_method="geometric"))


def describe_clusters(clusters: Clusters, previous: Clusters | None, source: ImageSource) -> dict[str, float]:
    """What the log says about a partition: sizes, and its agreement with the one before and with the true labels."""
    assigned = clusters.assignments()
    sizes = assigned[assigned >= 0].bincount(minlength=clusters.num_super * clusters.num_sub)
    line = {
        "clusters": int((sizes > 0).sum()),
        "empty_clusters": int((sizes == 0).sum()),
        "smallest_cluster": int(sizes[sizes > 0].min()),
        "largest_cluster": int(sizes.max()),
    }
    if previous is not None and len(previous.super_clusters) == len(assigned):
        line["nmi_previous"] = nmi(assigned, previous.assignments())
    if source.labels is not None:
        line["nmi_labels"] = nmi(assigned, torch.from_numpy(source.labels[: len(assigned)]))
    return line


# --- Lists and pictures -----------------------------------------------------------------------------------------------


def members(clusters: Clusters, super_cluster: int) -> list[np.ndarray]:
    """Images of each sub-cluster of a super-cluster, the largest one first, empty ones left out."""
    images = clusters.members(super_cluster)
    found = [images[clusters.sub_clusters[images] == sub].numpy() for sub in clusters.sub_clusters[images].unique()]
    return sorted(found, key=len, reverse=True)


def save_clusters(source: ImageSource, clusters: Clusters, path: Path) -> Path:
    """The cluster of every image, as one number and by levels, as CSV and, where there are classes, its class."""
    labelled = source.classes is not None
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "cluster", "super_cluster", "sub_cluster", *(["class"] if labelled else [])])
        levels = clusters.assignments(), clusters.super_clusters, clusters.sub_clusters
        for i, numbers in enumerate(torch.stack(levels, dim=1).tolist()):
            writer.writerow([source.path(i), *numbers, *([source.classes[source.label(i)]] if labelled else [])])
    return path


def row_of(source: ImageSource, images: np.ndarray, name: str) -> list[Tile]:
    """Some images of a cluster, evenly spaced; a green frame where one is of the cluster's most frequent class."""
    chosen = images[np.linspace(0, len(images) - 1, min(len(images), IMAGES_SHOWN)).round().astype(int)].tolist()
    tiles, titles = [Tile(thumbnail(source, i)) for i in chosen], [f"{name} ({len(images):,})", ""]
    if source.labels is not None:
        counts = np.bincount(source.labels[images])
        titles.append(f"{100 * counts.max() / len(images):.0f} % {source.classes[counts.argmax()]}")
        for tile, i in zip(tiles, chosen, strict=True):
            tile.frame = AGREE if source.label(i) == counts.argmax() else DIFFER
    for tile, title in zip(tiles, titles, strict=False):
        tile.title = title
    return tiles


def save_rows(source: ImageSource, rows: list[list[Tile]], heading: str, path: Path) -> Path:
    labelled = "\nA green frame: the image is of its row's most frequent class, which training never saw."
    return save_sheet(rows, path, heading + (labelled if source.labels is not None else ""), [0.75] * len(rows))


def save_super_clusters(source: ImageSource, clusters: Clusters, path: Path) -> Path:
    """Images of the super-clusters, a row each; with rotations each of them is four super-classes."""
    rows = []
    for number in range(min(clusters.num_super, SHEETS)):
        if len(images := clusters.members(number).numpy()):
            rows.append(row_of(source, images, f"super {number}"))
    return save_rows(source, rows, f"{len(rows)} of {clusters.num_super} super-clusters (images)", path)


def save_sub_clusters(source: ImageSource, clusters: Clusters, number: int, path: Path) -> Path:
    """Images of some sub-clusters of a super-cluster, from the largest to the smallest one."""
    found = members(clusters, number)
    chosen = np.linspace(0, len(found) - 1, min(len(found), SUB_SHOWN)).round().astype(int)
    rows = [row_of(source, found[i], f"sub {int(clusters.sub_clusters[found[i][0]])}") for i in chosen]
    heading = (
        f"Super-cluster {number}: {len(rows)} of {len(found)} sub-clusters, from the largest to the smallest (images)"
    )
    return save_rows(source, rows, heading, path)


def save_folders(source: ImageSource, clusters: Clusters, folder: Path) -> Path:
    """``super_00/sub_0000/`` with links to the images of a sub-cluster; what an earlier run wrote is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    groups = {}
    for number in range(clusters.num_super):
        for images in members(clusters, number):
            groups[f"super_{number:02}/sub_{int(clusters.sub_clusters[images[0]]):04}"] = images.tolist()
    return link_images(source, groups, folder)


# --- Report -----------------------------------------------------------------------------------------------------------


def report(run: Run, source: ImageSource, clusters: Clusters, layout: Layout, knn: KNNMonitor) -> None:
    """List and draw the final clusters, draw the curves, and print the text."""
    ending, args = Report(run), run.args
    listed = BadImages(len(source), run.output_dir / "bad_images.txt").rows(source)
    unreadable = [i for i in listed if i < len(clusters.sub_clusters)]
    clusters.super_clusters[unreadable] = clusters.sub_clusters[unreadable] = -1  # of the images in their places
    ending.files.append(str(save_clusters(source, clusters, run.output_dir / "clusters.csv")))
    learned = [f"{layout.super_classes} super-classes, loss of chance {chance(layout, clusters):.2f}"]
    if args.k > 1:
        if args.pictures and len(source) <= args.cluster_folders:
            ending.files.append(str(save_folders(source, clusters, run.output_dir / "clusters")))
        if clusters.num_super > 1:
            ending.draw("super_clusters.png", partial(save_super_clusters, source, clusters))
        for number in range(min(clusters.num_super, SHEETS)):
            ending.draw(f"super_{number:02}.png", partial(save_sub_clusters, source, clusters, number))
        for key, what in (("nmi_previous", "the partition before"), ("nmi_labels", "the true labels")):
            if found := [line[key] for line in ending.lines if key in line]:
                learned.append(f"NMI with {what}: {found[0]:.3f} at first, {found[-1]:.3f} in the end")
    precisions = [line for line in ending.lines if "prec_super_class" in line][-1:]
    learned += [
        f"right in the last steps: super-class {line['prec_super_class']:.1f} % (chance "
        f"{100 / layout.super_classes:.1f} %), sub-class {line['prec_sub_class']:.1f} % (chance "
        f"{100 / clusters.num_sub:.1f} %)"
        for line in precisions
    ]
    ending.draw_curves("DeeperCluster training", PLOTS)
    after = partial(next_command, args, "deepercluster/main.py", pretrained=run.path)
    commands = [after("deepercluster/export.py", output_dir=run.output_dir / "export")]
    if knn.sources:
        commands.insert(0, after("deepercluster/eval_linear.py", conv=13, output_dir=run.output_dir / "linear"))
    own_images = command("deepercluster/main.py", data_path="YOUR_IMAGES", sobel=1, k=100, output_dir="YOUR_RUN")
    ending.finish(commands, own_images, learned, knn)


def chance(layout: Layout, clusters: Clusters) -> float:
    """The loss of a network that knows nothing."""
    return math.log(layout.super_classes) + math.log(clusters.num_sub)
