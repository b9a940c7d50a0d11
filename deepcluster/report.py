"""End-of-run report: trivial solutions, the clusters as a list and as a picture, curves, and what to run next."""

import math
from functools import partial

from shared.evaluation.knn_monitor import KNNMonitor
from shared.images.loading import BadImages
from shared.images.sources import ImageSource
from shared.pictures.report import Plot, Report, accuracy_plot
from shared.run.health import HealthRule
from shared.run.run import Run
from shared.run.summary import command, next_command

from .cluster_pictures import purity, save_cluster_sheet, save_clusters
from .clustering import Clusters

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
        lambda line: "train_loss" in line and 1 < line["clusters"] < math.exp(line["train_loss"] / 0.995),
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


def report(run: Run, source: ImageSource, clusters: Clusters, knn: KNNMonitor) -> None:
    """List and draw the final clusters, draw the curves, and print the text."""
    ending, assignments = Report(run), clusters.assignments.clone()
    assignments[BadImages(len(source), run.output_dir / "bad_images.txt").rows(source)] = -1
    ending.files.append(str(save_clusters(source, assignments, run.output_dir / "clusters.csv")))
    ending.draw("clusters.png", lambda path: save_cluster_sheet(source, clusters, path))
    ending.draw_curves("DeepCluster training", PLOTS)

    sizes = clusters.sizes()
    learned = [f"{clusters.num_filled} clusters of {sizes[sizes > 0].min()} to {sizes.max()} images"]
    if agreement := [line["nmi_previous"] for line in ending.lines if "nmi_previous" in line]:
        learned.append(f"NMI with the partition before: {agreement[0]:.3f} at first, {agreement[-1]:.3f} in the end")
    if agreement := [line["nmi_labels"] for line in ending.lines if "nmi_labels" in line]:
        learned.append(
            f"NMI with the true labels: {agreement[0]:.3f} before training, {agreement[-1]:.3f} in the end; "
            f"purity {100 * purity(clusters.assignments, source.labels):.1f} %"
        )
    after = partial(next_command, run.args, "deepcluster/main.py", model=run.path, conv=3)
    scripts = ("deepcluster/activ_retrieval.py", "deepcluster/gradient_ascent.py")
    commands = [after(script, exp=ending.folder) for script in scripts]
    if knn.sources:
        commands.insert(0, after("deepcluster/eval_linear.py", exp=run.output_dir / "linear"))
    own_images = command("deepcluster/main.py", "YOUR_IMAGES", sobel=True, k=100, exp="YOUR_RUN")
    ending.finish(commands, own_images, learned, knn)
