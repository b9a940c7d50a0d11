"""End-of-run report: trivial solutions, the clusters as a list and as a picture, curves, and what to run next."""

import math
from pathlib import Path

import numpy as np
from torch import Tensor

from shared.evaluation import partitions
from shared.evaluation.knn_monitor import KNNMonitor
from shared.evaluation.partitions import evenly, row_of, save_list, save_rows, tell_agreement, trivial_solutions
from shared.images.cluster_draws import cluster_lists
from shared.images.sources import ImageSource
from shared.pictures.report import Plot, Report, accuracy_plot
from shared.run.health import HealthRule
from shared.run.run import Run
from shared.run.summary import command

from .clustering import Clusters

CLUSTERS_SHOWN = 12

# trivial solutions (section 3.3): lines about clusters state ``images``, those about an epoch ``train_loss``
HEALTH_RULES = (
    HealthRule(
        "one cluster",
        lambda line: "images" in line and line["clusters"] == 1,
        "TRIVIAL: all images are in one cluster, so there is nothing to learn: look whether the images differ, lower "
        "--lr, or use Kmeans instead of --clustering PIC.",
    ),
    *trivial_solutions("--nmb_cluster", "--sobel"),
    HealthRule(
        "nothing learned",
        lambda line: "train_loss" in line and 1 < line["clusters"] < math.exp(line["train_loss"] / 0.995),
        "the loss {train_loss:.3f} is that of a network that knows nothing about {clusters} clusters: raise --lr, or "
        "lower --nmb_cluster so that clusters have more images.",
    ),
)
PLOTS = (
    Plot("Loss on the pseudo-labels", "cross-entropy", {"loss": ""}),
    *partitions.PLOTS,
    accuracy_plot("Weighted k-NN of the features"),
)


def report(run: Run, source: ImageSource, clusters: Clusters, knn: KNNMonitor) -> None:
    """List and draw the final clusters, draw the curves, and print the text."""
    ending, assignments = Report(run, "deepcluster/main.py"), clusters.assignments.clone()
    assignments[partitions.unreadable(run.output_dir, source, len(assignments))] = -1
    ending.files.append(str(save_list(source, {"cluster": assignments}, run.output_dir / "clusters.csv")))
    ending.draw("clusters.png", lambda path: save_cluster_sheet(source, clusters, path))
    ending.draw_curves("DeepCluster training", PLOTS)

    sizes = clusters.sizes()
    learned = [f"{clusters.num_filled} clusters of {sizes[sizes > 0].min()} to {sizes.max()} images"]
    learned += tell_agreement(ending.lines)
    if source.labels is not None:
        learned[-1] += f"; purity {100 * purity(clusters.assignments, source.labels):.1f} %"
    layer = {"model": run.path, "conv": 3}
    if knn.sources:
        ending.then("deepcluster/eval_linear.py", **layer, exp=run.output_dir / "linear")
    for script in ("deepcluster/activ_retrieval.py", "deepcluster/gradient_ascent.py"):
        ending.then(script, **layer, exp=ending.folder)
    own_images = command("deepcluster/main.py", "YOUR_IMAGES", sobel=True, k=100, exp="YOUR_RUN")
    ending.finish(learned, knn, own_images=own_images)


def save_cluster_sheet(source: ImageSource, clusters: Clusters, path: Path) -> Path:
    """Images of some clusters, one row each, from the largest cluster to the smallest one."""
    lists = cluster_lists(clusters.assignments.numpy(), clusters.num_clusters)
    by_size = clusters.sizes().argsort(descending=True, stable=True)[: clusters.num_filled].tolist()
    rows = [
        row_of(source, lists[number], f"cluster {number}", f"{len(lists[number])} images")
        for number in evenly(by_size, CLUSTERS_SHOWN)
    ]
    heading = f"{len(rows)} of {clusters.num_filled} clusters, from the largest to the smallest"
    return save_rows(source, rows, heading, path)


def purity(assignments: Tensor, labels: np.ndarray) -> float:
    """Share of the images that are of the most frequent class of their cluster."""
    lists = cluster_lists(assignments.numpy(), int(assignments.max()) + 1)
    return sum(np.bincount(labels[images]).max() for images in lists if len(images)) / len(labels)
