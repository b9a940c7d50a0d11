"""End-of-run report: super- and sub-classes as a list, sheets and folders, curves, and what to run next."""

import math
import shutil
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np

from shared.evaluation import partitions
from shared.evaluation.knn_monitor import KNNMonitor
from shared.evaluation.partitions import evenly, row_of, save_list, save_rows, tell_agreement, trivial_solutions
from shared.images.sources import ImageSource
from shared.pictures.report import Plot, Report, accuracy_plot
from shared.pictures.sheets import link_images
from shared.run.run import Run

from .clustering import Clusters, Layout

SUB_SHOWN, SHEETS = 12, 32  # rows of a sheet, sheets of super-clusters
HEALTH_RULES = trivial_solutions("--k", "--sobel true")
PLOTS = (
    Plot("Loss of super- and sub-classes", "cross-entropy", {"loss_super_class": "super", "loss_sub_class": "sub"}),
    Plot("Right predictions", "%", {"prec_super_class": "super-class", "prec_sub_class": "sub-class", "prec": "both"}),
    *partitions.PLOTS,
    accuracy_plot("Weighted k-NN of the features"),
)


# --- Lists and pictures -----------------------------------------------------------------------------------------------


def members(clusters: Clusters, super_cluster: int) -> list[np.ndarray]:
    """Images of each sub-cluster of a super-cluster, the largest one first, empty ones left out."""
    images = clusters.members(super_cluster)
    found = [images[clusters.sub_clusters[images] == sub].numpy() for sub in clusters.sub_clusters[images].unique()]
    return sorted(found, key=len, reverse=True)


def save_clusters(source: ImageSource, clusters: Clusters, path: Path) -> Path:
    """The cluster of every image, as one number and by levels, and its class."""
    levels = {"super_cluster": clusters.super_clusters, "sub_cluster": clusters.sub_clusters}
    return save_list(source, {"cluster": clusters.assignments()} | levels, path)


def save_super_clusters(source: ImageSource, clusters: Clusters, path: Path) -> Path:
    """Images of the super-clusters, a row each; with rotations each of them is four super-classes."""
    rows = []
    for number in range(min(clusters.num_super, SHEETS)):
        if len(images := clusters.members(number).numpy()):
            rows.append(row_of(source, images, f"super {number} ({len(images):,})", ""))
    return save_rows(source, rows, f"{len(rows)} of {clusters.num_super} super-clusters (images)", path)


def save_sub_clusters(source: ImageSource, clusters: Clusters, number: int, path: Path) -> Path:
    """Images of some sub-clusters of a super-cluster, from the largest to the smallest one."""
    found = members(clusters, number)
    rows = [
        row_of(source, images, f"sub {int(clusters.sub_clusters[images[0]])} ({len(images):,})", "")
        for images in evenly(found, SUB_SHOWN)
    ]
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
    ending, args = Report(run, "deepercluster/main.py"), run.args
    unreadable = partitions.unreadable(run.output_dir, source, len(clusters.sub_clusters))
    clusters = deepcopy(clusters)
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
        learned += tell_agreement(ending.lines)
    precisions = [line for line in ending.lines if "prec_super_class" in line][-1:]
    learned += [
        f"right in the last steps: super-class {line['prec_super_class']:.1f} % (chance "
        f"{100 / layout.super_classes:.1f} %), sub-class {line['prec_sub_class']:.1f} % (chance "
        f"{100 / clusters.num_sub:.1f} %)"
        for line in precisions
    ]
    ending.draw_curves("DeeperCluster training", PLOTS)
    if knn.sources:
        linear = {"conv": 13, "output_dir": run.output_dir / "linear"}
        ending.then("deepercluster/eval_linear.py", pretrained=run.path, **linear)
    ending.then("deepercluster/export.py", pretrained=run.path, output_dir=run.output_dir / "export")
    ending.finish(learned, knn, sobel=1, k=100)


def chance(layout: Layout, clusters: Clusters) -> float:
    """The loss of a network that knows nothing."""
    return math.log(layout.super_classes) + math.log(clusters.num_sub)
