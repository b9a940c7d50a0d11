"""From features to clusters: PCA with whitening, then k-means or power iteration clustering (PIC).

Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features", ECCV 2018, sections 3.2 and 3.3; PIC as in
its appendix, after Lin and Cohen, "Power Iteration Clustering", ICML 2010.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed
from shared.evaluation.cluster_sums import nearest, sum_by_cluster
from shared.evaluation.knn import nearest_neighbours
from shared.evaluation.sharded_features import BLOCK_ROWS, labels_of_all, mean_and_covariance, rows_of_all

from .convnets import new_top_layer

try:
    import faiss
except ImportError:  # k-means in torch needs none
    faiss = None

ITERATIONS = 20  # of k-means
NEIGHBOURS = 5  # of an image in power iteration clustering


# --- PCA --------------------------------------------------------------------------------------------------------------


def pca_whiten(features: Tensor, dim: int, device: torch.device | str = "cpu") -> tuple[Tensor, int]:
    """Project on the first principal components, divide by their standard deviations, L2-normalise each row.

    Mean and covariance are those of the rows of all processes.

    Args:
        features: Rows of this process, (n, D), float32.
        dim: Number of components.
        device: Where to compute; the rows go there in portions.

    Returns:
        The rows of this process, (n, dim), on ``device``, and how many components have any variance. Those that have
        none stay 0: divided by their standard deviation, rounding errors would become features.

    Raises:
        ValueError: If ``dim`` is more than D or than the number of rows.
    """
    mean, covariance, rows = mean_and_covariance(features, device)
    check_components(dim, features.shape[1], rows)
    # one process decomposes for all: another machine's library could choose other signs
    whitening = _whitening_matrix(covariance, dim) if distributed.is_main_process() else None
    matrix, with_variance = distributed.broadcast_object(whitening)
    matrix = matrix.to(device)
    whitened = [F.normalize((block.to(device) - mean) @ matrix, dim=1) for block in features.split(BLOCK_ROWS)]
    return torch.cat(whitened), with_variance


def check_components(dim: int, features: int, rows: int) -> None:
    """Raise ``ValueError`` if so many rows of features have fewer than ``dim`` principal components."""
    if not 1 <= dim <= (most := min(features, rows)):
        raise ValueError(
            f"--pca_dim {dim}: {rows} features of {features} dimensions have between 1 and {most} principal components"
        )


def _whitening_matrix(covariance: Tensor, dim: int) -> tuple[Tensor, int]:
    """Eigenvectors over square roots of eigenvalues, largest first, (D, dim), and how many are not 0."""
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances.flip(0)[:dim], directions.flip(1)[:, :dim]
    varies = variances > 1e-10 * variances[0]
    scale = torch.where(varies, variances.clamp_min(torch.finfo(torch.double).tiny).rsqrt(), 0.0)
    return (directions * scale).float().cpu(), int(varies.sum())


def gather_rows(rows_of_rank: Tensor, num_rows: int) -> Tensor | None:
    """Rows of all ranks in the order of the data set, (n, D) on each to (``num_rows``, D), on rank 0; None elsewhere.

    Row i of rank r is row ``r + i * W`` of the data set, as with ``range(r, num_rows, W)``.
    """
    if (world_size := distributed.get_world_size()) == 1:
        return rows_of_rank
    missing = -(-num_rows // world_size) - len(rows_of_rank)  # all ranks send the same shape
    rows = distributed.gather_on_main(F.pad(rows_of_rank, (0, 0, 0, missing)))
    return None if rows is None else rows.transpose(0, 1).flatten(0, 1)[:num_rows].to(rows_of_rank.device)


# --- Clusters ---------------------------------------------------------------------------------------------------------


@dataclass
class Clusters:
    """A partition of the images.

    Attributes:
        assignments: Cluster of each image, int64, (N,).
        num_clusters: K; some of them may be empty.
        loss: Sum of squared distances to the centroids (k-means), or 0 (PIC).
    """

    assignments: Tensor
    num_clusters: int
    loss: float = 0.0

    def sizes(self) -> Tensor:
        """Images per cluster, (K,)."""
        return self.assignments.bincount(minlength=self.num_clusters)

    @property
    def num_filled(self) -> int:
        """Clusters that have images."""
        return int((self.sizes() > 0).sum())


class ClusteringState:
    """The clusters of an epoch and their top layer, which checkpoints hold.

    Args:
        dim: Of the features.
        images: Checksum of the training images; clusters of other images are not taken over.
        device: Of the top layer.

    Attributes:
        evaluated_before: Whether the evaluation before training is done.
        epoch: That of the clusters.
        clusters: None before the first clustering.
        top_layer: For ``clusters``.
    """

    evaluated_before = False
    epoch = -1
    clusters: Clusters | None = None
    top_layer: nn.Linear | None = None

    def __init__(self, dim: int, images: int, device: torch.device):
        self.dim, self.images, self.device = dim, images, device

    def state_dict(self) -> dict:
        return {
            "evaluated_before": self.evaluated_before,
            "clustered_epoch": self.epoch,
            "clusters": self.clusters and vars(self.clusters),
            "top_layer": {} if self.top_layer is None else self.top_layer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.evaluated_before = state["evaluated_before"]
        if state["images"] == self.images and state["clusters"]:
            self.epoch, self.clusters = state["clustered_epoch"], Clusters(**state["clusters"])
            self.top_layer = new_top_layer(self.dim, self.clusters.num_clusters).to(self.device)
            self.top_layer.load_state_dict(state["top_layer"])


def check_clustering(num_images: int, algorithm: str, num_clusters: int, backend: str = "auto") -> None:
    """Raise ``ValueError`` if :func:`cluster` cannot do this."""
    if algorithm == "PIC" and num_images <= NEIGHBOURS:
        raise ValueError(f"--clustering PIC: {NEIGHBOURS} neighbours need more images than {num_images}")
    if algorithm == "Kmeans" and not 1 <= num_clusters <= num_images:
        take = f"take --nmb_cluster {max(2, num_images // 10)}"
        raise ValueError(
            f"--nmb_cluster {num_clusters}: {num_images} images make between 1 and {num_images} clusters: {take}"
        )
    if backend not in ("auto", "faiss", "torch"):
        raise ValueError(f"--kmeans {backend!r} is none of auto, faiss and torch")
    if algorithm == "Kmeans" and backend == "faiss" and faiss is None:
        raise ValueError("--kmeans faiss: faiss is not installed; pip install faiss-cpu, or use --kmeans torch")


def cluster(features: Tensor, algorithm: str, num_clusters: int, seed: int, backend: str = "auto") -> Clusters:
    """Cluster the features of all processes; every process gets the result.

    k-means in torch runs on all processes, each with its own features. faiss and PIC run on the first process, which
    gets the features of all. Both k-means start from the same rows and treat empty clusters alike, so that they find
    the same clusters up to rounding.

    Args:
        features: Whitened, normalised features of this process's images (every W-th one), (n, d), float32.
        algorithm: ``Kmeans`` or ``PIC``, which finds the number of clusters itself.
        num_clusters: K of k-means.
        seed: Of the rows that k-means starts from.
        backend: Of k-means: ``faiss``, ``torch``, or ``auto``: torch on a GPU, else faiss where it is installed.

    Raises:
        ValueError: As :func:`check_clustering`.
    """
    num_images = int(distributed.all_reduce_sum(torch.tensor(len(features), device=features.device)))
    check_clustering(num_images, algorithm, num_clusters, backend)
    generator = torch.Generator().manual_seed(seed % 2**63)
    start = torch.randperm(num_images, generator=generator)[:num_clusters]
    with_faiss = backend == "faiss" or (backend == "auto" and faiss is not None and features.device.type == "cpu")
    if algorithm == "Kmeans" and not with_faiss:
        result = kmeans_torch(features, rows_of_all(features, start))
        mine = torch.arange(distributed.get_rank(), num_images, distributed.get_world_size())
        return Clusters(labels_of_all(result.assignments, mine, num_images), num_clusters, result.objective[-1])
    features = gather_rows(features, num_images)
    found = None
    if distributed.is_main_process():
        if algorithm == "PIC":
            assignments = power_iteration_clustering(features)
            found = assignments.numpy(), int(assignments.max()) + 1, 0.0
        else:
            features = features.cpu()
            result = kmeans_faiss(features, features[start])
            found = result.assignments.numpy(), num_clusters, result.objective[-1]
    assignments, num_clusters, loss = distributed.broadcast_object(found)
    return Clusters(torch.from_numpy(assignments), num_clusters, loss)


# --- k-means ----------------------------------------------------------------------------------------------------------


@dataclass
class KMeans:
    """Result of Lloyd's k-means with the Euclidean distance.

    Attributes:
        assignments: Nearest final centroid of each row, int64, (N,).
        centroids: (K, d).
        objective: Sum of squared distances in each iteration, before its centroids move.
    """

    assignments: Tensor
    centroids: Tensor
    objective: list[float]


def kmeans_faiss(features: Tensor, centroids: Tensor, iterations: int = ITERATIONS) -> KMeans:
    """k-means of faiss from given centroids (K, d), on the CPU."""
    num_clusters, dim = centroids.shape
    rows = np.ascontiguousarray(features.numpy())
    clustering = faiss.Clustering(dim, num_clusters)
    clustering.niter = iterations
    clustering.min_points_per_centroid = 1  # fewer than 39 are no reason for a warning here
    clustering.max_points_per_centroid = len(rows)  # take all rows
    faiss.copy_array_to_vector(np.ascontiguousarray(centroids.numpy()).ravel(), clustering.centroids)
    index = faiss.IndexFlatL2(dim)
    clustering.train(rows, index)
    _, assignments = index.search(rows, 1)
    found = faiss.vector_to_array(clustering.centroids).reshape(num_clusters, dim)
    statistics = clustering.iteration_stats
    objective = [statistics.at(i).obj for i in range(statistics.size())]
    return KMeans(torch.from_numpy(assignments[:, 0]), torch.from_numpy(found), objective)


def kmeans_torch(features: Tensor, centroids: Tensor, iterations: int = ITERATIONS) -> KMeans:
    """k-means of faiss in torch, from given centroids (K, d), on the device of the features.

    Args:
        features: Rows of this process, (n, d); those of all processes are clustered together.
        centroids: The same on every process.

    Returns:
        Assignments of this process's rows; centroids and objective, which are the same on every process.
    """
    num_rows = int(distributed.all_reduce_sum(torch.tensor(len(features), device=features.device)))
    objective = []
    for _ in range(iterations):
        assignments, distance = assign(features, centroids)
        objective.append(distributed.all_reduce_sum(distance).item())
        counts = distributed.all_reduce_sum(assignments.bincount(minlength=len(centroids)))
        sums = distributed.all_reduce_sum(sum_by_cluster(features, assignments, len(centroids)))
        moved = (sums / counts.clamp_min(1)[:, None]).float()
        split_empty_clusters(moved, counts, num_rows)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    assignments, _ = assign(features, centroids)
    return KMeans(assignments, centroids, objective)


def assign(features: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each row, int64, (N,), and the sum of the squared distances, float64, 0-d."""
    found, scores = nearest(features, centroids, centroids.square().sum(dim=1) / -2)
    return found, (features.square().sum(dim=1) - 2 * scores).sum(dtype=torch.double)


def split_empty_clusters(centroids: Tensor, counts: Tensor, num_rows: int) -> None:
    """Give every empty cluster half of another one, in place, with the same random numbers every time.

    As in faiss: going round the clusters, one of size n is taken with probability (n - 1) / (N - K); its centroid is
    doubled, and the two copies are moved apart by 1/1024 of each coordinate.

    Args:
        centroids: (K, d).
        counts: Size of each cluster, (K,).
        num_rows: N.
    """
    (empty,) = np.nonzero((counts == 0).cpu().numpy())
    if len(empty) == 0:
        return
    sizes = counts.cpu().numpy().astype(np.float32)
    words = np.random.RandomState(1234)
    away = torch.where(torch.arange(centroids.shape[1], device=centroids.device) % 2 == 0, 1 / 1024, -1 / 1024)
    for taker in empty:
        giver = _draw_cluster(sizes, num_rows, words)
        centroids[taker] = centroids[giver] * (1 + away)
        centroids[giver] = centroids[giver] * (1 - away)
        sizes[taker] = sizes[giver] / 2
        sizes[giver] -= sizes[taker]


def _draw_cluster(sizes: np.ndarray, num_rows: int, words: np.random.RandomState) -> int:
    with np.errstate(divide="ignore", invalid="ignore"):  # N = K: a cluster of one row is never taken
        chances = ((sizes - 1) / np.float32(num_rows - len(sizes))).astype(np.float32)
    while True:
        state = words.get_state()
        draws = np.frombuffer(words.bytes(4 * len(sizes)), dtype="<u4").astype(np.float32) * np.float32(2.0**-32)
        (hits,) = np.nonzero(draws < chances)
        if len(hits):
            words.set_state(state)
            words.bytes(4 * (int(hits[0]) + 1))  # only the numbers up to the hit are used up
            return int(hits[0])


# --- Power iteration clustering ---------------------------------------------------------------------------------------


def power_iteration_clustering(
    features: Tensor,
    num_neighbours: int = NEIGHBOURS,
    sigma: float = 0.2,
    alpha: float = 0.001,
    merge_singletons: bool = True,
) -> Tensor:
    """Cluster a graph of nearest neighbours; the number of clusters comes out of the data.

    A vector v diffuses over the graph; then every image points to the neighbour with the steepest rise of v, and
    images that lead to the same summit are a cluster. Whitened vectors are so far apart that v is uniform up to
    rounding, so the rise is taken from what diffuses, see :func:`diffuse`.

    Args:
        features: (N, d), float32.
        num_neighbours: Neighbours of each image.
        sigma: Width of the affinity exp(-d^2 / sigma^2).
        alpha: Share of v that diffuses in each step.
        merge_singletons: Whether clusters of one image are added to that of a neighbour.

    Returns:
        Cluster of each image, int64, (N,) on the CPU, numbered in the order of their summits.
    """
    neighbours, distances = neighbour_graph(features, num_neighbours)
    rows, columns, weights = symmetric_affinity(neighbours, np.exp(-distances.astype(np.float64) / sigma**2))
    inflow = diffuse(rows, columns, weights, len(features), alpha)
    clusters = climb(rows, columns, weights, inflow)
    if merge_singletons:
        clusters = _merge_singletons(clusters, neighbours)
    return torch.from_numpy(clusters)


def neighbour_graph(features: Tensor, num_neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """Nearest other rows of each row, best first, int64, (N, n), and their squared distances."""
    norms = features.square().sum(dim=1, keepdim=True)
    queries = torch.cat([2 * features, -torch.ones_like(norms)], dim=1)
    database = torch.cat([features, norms], dim=1)  # the product is 2 x y - |y|^2
    _, indices = nearest_neighbours(queries, database, num_neighbours + 1)
    own = indices == torch.arange(len(features), device=features.device)[:, None]
    own[~own.any(dim=1), -1] = True  # hidden behind as many duplicates: drop the last one instead
    indices = indices[~own].view(len(features), num_neighbours)
    distances = torch.stack([(features - features[column]).square().sum(dim=1) for column in indices.t()], dim=1)
    return indices.cpu().numpy(), distances.cpu().numpy()


def symmetric_affinity(neighbours: np.ndarray, affinity: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and values of A + A^T, sorted by row and column; mutual neighbours count twice.

    Args:
        neighbours: (N, n).
        affinity: Values of A at them, (N, n).
    """
    size = len(neighbours)
    sources = np.arange(size).repeat(neighbours.shape[1])
    targets = neighbours.ravel()
    edges, inverse = np.unique(
        np.concatenate([sources * size + targets, targets * size + sources]), return_inverse=True
    )
    values = np.bincount(inverse.ravel(), np.tile(affinity.ravel(), 2), len(edges))
    return edges // size, edges % size, values


def diffuse(
    rows: np.ndarray, columns: np.ndarray, weights: np.ndarray, size: int, alpha: float, steps: int = 200
) -> np.ndarray:
    """v <- alpha W^T v + (1 - alpha) / N, normalised to a sum of 1, ``steps`` times from the uniform vector.

    Returns:
        g = W^T v of the last step, (N,). With its sum S before it is normalised, v_j - v_i = alpha (g_j - g_i) / S: v
        rises where g does, but where alpha g is less than the rounding of 1 / N, differences of v are nothing else.
    """
    mass = np.full(size, 1 / size)
    for _ in range(steps):
        inflow = np.bincount(columns, weights * mass[rows], size)
        mass = alpha * inflow + (1 - alpha) / size
        mass /= mass.sum()
    return inflow


def climb(rows: np.ndarray, columns: np.ndarray, weights: np.ndarray, inflow: np.ndarray) -> np.ndarray:
    """Follow, from every image, the edge with the largest W_ij (g_j - g_i) > 0 to a summit; number the summits."""
    gains = weights * (inflow[columns] - inflow[rows])
    starts = np.flatnonzero(np.diff(rows, prepend=-1))  # every image has an edge
    best = np.maximum.reduceat(gains, starts)
    is_best = (gains == best[rows]) & (gains > 0)
    targets = np.arange(len(inflow))
    targets[rows[is_best][::-1]] = columns[is_best][::-1]  # of equal gains the first one counts
    while not np.array_equal(targets, targets[targets]):
        targets = targets[targets]
    return np.unique(targets, return_inverse=True)[1].astype(np.int64)


def _merge_singletons(clusters: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Add images that are alone to the cluster of their first neighbour that is not; close the gaps in the numbers."""
    sizes = np.bincount(clusters)
    merged = clusters.copy()
    for image in np.flatnonzero(sizes[clusters] == 1):
        homes = clusters[neighbours[image]]
        homes = homes[sizes[homes] > 1]
        if len(homes):
            merged[image] = homes[0]
    return np.unique(merged, return_inverse=True)[1].astype(np.int64)
