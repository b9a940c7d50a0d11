"""Telling a user in one sentence when clusters or training have become trivial (section 3.3)."""

import math

from torch import Tensor


def trivial_clusters(sizes: Tensor) -> str | None:
    """A sentence if this partition cannot teach a network anything, else None.

    Args:
        sizes: Images per cluster, (K,).
    """
    num_images, largest, filled = int(sizes.sum()), int(sizes.max()), int((sizes > 0).sum())
    if filled == 1:
        return (
            "TRIVIAL: all images are in one cluster, so there is nothing to learn: give --nmb_cluster 2 or more "
            "(or, with --clustering PIC, use Kmeans)."
        )
    if largest > num_images / 2:
        return (
            f"TRIVIAL: the largest cluster holds {100 * largest / num_images:.0f} % of the images, their features "
            "hardly differ: lower --lr, or look at edges instead of colours with --sobel."
        )
    if filled < len(sizes) / 2:
        return (
            f"TRIVIAL: only {filled} of {len(sizes)} clusters have images, many features are equal: lower "
            "--nmb_cluster or --lr."
        )
    return None


def trivial_training(loss: float, num_labels: int) -> str | None:
    """A sentence if an epoch ended with the loss of a network that knows nothing, else None.

    Args:
        loss: Mean cross-entropy of the epoch in nats.
        num_labels: Clusters that have images.
    """
    if num_labels > 1 and loss > 0.995 * math.log(num_labels):
        return (
            f"the loss {loss:.3f} is that of a network that knows nothing (ln {num_labels} = "
            f"{math.log(num_labels):.3f}): raise --lr, or lower --nmb_cluster so that clusters have more images."
        )
    return None
