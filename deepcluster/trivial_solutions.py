"""Trivial solutions (section 3.3), told in one sentence."""

import math

from shared.run.health import HealthRule

# lines about clusters state ``images``, those about an epoch of training ``train_loss``
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


def loss_of_a_guess(line: dict) -> float:
    """A little less than the cross-entropy of equal scores, in nats."""
    return 0.995 * math.log(line["clusters"])
