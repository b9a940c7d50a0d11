"""Images assigned to prototypes: the assignment, merged prototypes, and what can be said about the result."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor

from shared.evaluation.cluster_sums import nearest


@dataclass
class Clustering:
    """N images in C clusters.

    Attributes:
        clusters: Cluster of each image, shape (N,), in 0 .. C - 1.
        confidences: Probability of it, shape (N,).
        prototypes: Nearest prototype of each image, shape (N,); the cluster unless they were merged.
        entropy: Mean entropy of the probabilities of the prototypes, as a share of ln K: 1 when every prototype fits
            every image equally well.
        num_prototypes: K.
        num_clusters: C; K, or the number that prototypes were merged into.
        indices: Index of each image in its source, shape (N,).
        labels: Class of each image, shape (N,), or None.
    """

    clusters: np.ndarray
    confidences: np.ndarray
    prototypes: np.ndarray
    entropy: float
    num_prototypes: int
    num_clusters: int
    indices: np.ndarray | None = None
    labels: np.ndarray | None = None

    def sizes(self) -> np.ndarray:
        """Images of each cluster, shape (C,)."""
        return np.bincount(self.clusters, minlength=self.num_clusters)

    def largest_first(self) -> list[int]:
        """Clusters that have images; equal sizes in the order of their numbers."""
        sizes = self.sizes()
        return [int(c) for c in np.argsort(-sizes, kind="stable") if sizes[c] > 0]

    def members(self, cluster: int) -> np.ndarray:
        """Positions in 0 .. N - 1 of a cluster's images, most confident first."""
        (members,) = np.nonzero(self.clusters == cluster)
        return members[np.argsort(-self.confidences[members], kind="stable")]

    def majority(self, cluster: int) -> tuple[int, float]:
        """The most frequent class of a cluster and its share."""
        counts = np.bincount(self.labels[self.clusters == cluster])
        return int(counts.argmax()), float(counts.max() / counts.sum())


@torch.no_grad()
def assign(embeddings: Tensor, prototypes: Tensor, temperature: float = 0.1, merge_into: int = 0) -> Clustering:
    """Give every image to the cluster of its nearest prototype.

    The probability of a cluster is the softmax over clusters of score / temperature (eq. 2), where the score of merged
    prototypes is that of the nearest one: their number does not count, and every cluster that is asked for has images.

    Args:
        embeddings: Unit vectors (N, D).
        prototypes: Unit vectors (K, D).
        merge_into: Number of clusters to merge the prototypes in use into; 0 for one cluster per prototype.
    """
    k, num_clusters = len(prototypes), merge_into or len(prototypes)
    closest, _ = nearest(embeddings, prototypes)
    clusters = closest
    if merge_into:
        groups = merge_prototypes(prototypes, torch.bincount(closest, minlength=k), merge_into)
        clusters = groups[closest]
    confidences, entropies = [], []
    for rows, mine in zip(embeddings.split(4096), clusters.split(4096), strict=True):
        scores = rows @ prototypes.T / temperature
        entropies.append(torch.special.entr(scores.softmax(dim=1)).sum(dim=1))
        if merge_into:
            scores = torch.stack([scores[:, groups == cluster].amax(dim=1) for cluster in range(merge_into)], dim=1)
        confidences.append(scores.softmax(dim=1).gather(1, mine[:, None])[:, 0])
    clusters = clusters.cpu().numpy()
    if merge_into:  # their numbers mean nothing yet: the largest becomes 0
        order = np.argsort(-np.bincount(clusters, minlength=num_clusters), kind="stable")
        clusters = np.argsort(order)[clusters]
    return Clustering(
        clusters,
        torch.cat(confidences).cpu().numpy(),
        closest.cpu().numpy(),
        torch.cat(entropies).mean().item() / math.log(max(k, 2)),
        k,
        num_clusters,
    )


def merge_prototypes(prototypes: Tensor, images: Tensor, number: int) -> Tensor:
    """Group prototypes that lie close together (Ward's method); those without images join the nearest group.

    Args:
        prototypes: Unit vectors (K, D).
        images: Images of each prototype, shape (K,).
        number: How many groups.

    Returns:
        Group of each prototype, shape (K,).
    """
    used = images > 0
    if not 2 <= number <= int(used.sum()):
        raise ValueError(f"--merge_into {number}: expected 2 to {int(used.sum())}, the number of prototypes in use")
    groups = AgglomerativeClustering(number, linkage="ward").fit_predict(prototypes[used].cpu().numpy())
    groups = torch.from_numpy(groups).to(prototypes.device)
    centres = prototypes.new_zeros(number, prototypes.shape[1]).index_add_(0, groups, prototypes[used])
    merged = (prototypes @ F.normalize(centres, dim=1).T).argmax(dim=1)
    merged[used] = groups
    return merged


def summarise(clustering: Clustering) -> dict:
    """Statistics of a clustering; with labels also its agreement with them.

    ``entropy`` is that of :class:`Clustering`; ``prototype_perplexity`` is the number of equally used prototypes with
    the same entropy of their use. NMI (arithmetic mean) and ARI are scikit-learn's; purity grows with the number of
    clusters.
    """
    counts = np.bincount(clustering.prototypes, minlength=clustering.num_prototypes)
    shares = counts[counts > 0] / counts.sum()
    summary = {
        "images": len(clustering.clusters),
        "prototypes": clustering.num_prototypes,
        "prototypes_used": int((counts > 0).sum()),
        "prototype_perplexity": math.exp(-(shares * np.log(shares)).sum()),
        "dead_prototypes": np.flatnonzero(counts == 0).tolist(),
        "clusters": int((clustering.sizes() > 0).sum()),
        "mean_confidence": float(clustering.confidences.mean()),
        "entropy": clustering.entropy,
    }
    if clustering.labels is not None:
        summary |= {
            "classes": len(np.unique(clustering.labels)),
            "nmi": float(normalized_mutual_info_score(clustering.labels, clustering.clusters)),
            "ari": float(adjusted_rand_score(clustering.labels, clustering.clusters)),
            "purity": purity(clustering.labels, clustering.clusters),
        }
    return summary


def purity(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Share of images that belong to the majority class of their cluster."""
    counts = contingency_matrix(labels, clusters, sparse=True)  # (classes, clusters)
    return float(counts.max(axis=0).sum() / len(labels))


def describe(summary: dict) -> str:
    """The summary in sentences, with a warning where the assignment says little."""
    images, used, k = summary["images"], summary["prototypes_used"], summary["prototypes"]
    lines = [
        f"{images} images in {summary['clusters']} clusters, mean confidence {summary['mean_confidence']:.3f}",
        f"{used} of {k} prototypes are used, as if {summary['prototype_perplexity']:.1f} of them were used equally; "
        f"{k - used} are dead",
    ]
    if "nmi" in summary:
        lines.append(
            f"agreement with the {summary['classes']} classes: NMI {summary['nmi']:.3f}, ARI {summary['ari']:.3f}, "
            f"purity {summary['purity']:.3f}"
        )
    advice = "train with a smaller --epsilon (0.03) or a longer --freeze_prototypes_niters"
    if summary["entropy"] > 0.99:
        lines.append(f"WARNING: every prototype fits every image equally well: the network has collapsed; {advice}")
    elif summary["prototype_perplexity"] < 0.1 * min(k, images):
        lines.append(
            "WARNING: few prototypes are used: either the images are much alike, or the network has collapsed; then "
            + advice
        )
    return "\n".join(lines)
