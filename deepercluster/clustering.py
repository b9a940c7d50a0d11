"""From features to super- and sub-classes: groups of processes, whitening, k-means in two levels.

Caron et al., "Unsupervised Pre-Training of Image Features on Non-Curated Data", ICCV 2019, section 4.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed
from shared.evaluation.cluster_sums import BLOCK_SCORES, nearest, sum_by_cluster, sum_by_cluster_on_cpu
from shared.evaluation.sharded_features import labels_of_all, mean_and_covariance, rows_of_all
from shared.images.cluster_draws import cluster_lists, count_repetitions, draw_uniformly
from shared.optimisation.optim import keep_options, load_optimizer_state
from shared.run.randomness import derive_seed

LEAST_VARIANCE = 1e-5  # of a principal component, as a share of the largest one
ROUNDING = 1e-13  # variance of rounding errors, as a share of the squared mean
CLOSE = 1e-7  # between the two halves of a cluster, in every coordinate, by the released rule
NO_CLUSTER = -1


# --- Groups of processes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where one of the recipe's processes is.

    Attributes:
        training_rank, super_class: In its training group, and which one that is: the group trains this super-class.
        clustering_rank, super_cluster: In its clustering group, and which one that is.
        rotation: Quarter turns of its images.
    """

    training_rank: int
    super_class: int
    clustering_rank: int
    super_cluster: int
    rotation: int


@dataclass(frozen=True)
class Layout:
    """How W processes share out S super-classes: each of S training groups has one, each of C clustering groups the
    four (or one, without rotations) that a super-cluster makes.

    Fewer processes than super-classes, even one, each take the places of several: the recipe always has at least S.

    Args:
        world_size, super_classes: W and S; ``ValueError`` if they cannot be shared out.
        rotnet: Whether a super-class is a super-cluster with a rotation.
    """

    world_size: int
    super_classes: int
    rotnet: bool

    def __post_init__(self):
        w, s = self.world_size, self.super_classes
        if (self.rotnet and s % 4) or s < 1:
            raise ValueError(f"--super_classes {s}: with --rotnet it is four times the number of super-clusters")
        c = self.super_clusters
        if (w % s and s % w) or (w % c and c % w):
            raise ValueError(
                f"--super_classes {s}: {w} processes are neither a multiple nor a divisor of it"
                + (f" and of its {c} super-clusters" if self.rotnet else "")
            )

    @property
    def super_clusters(self) -> int:  # C
        return self.super_classes // 4 if self.rotnet else self.super_classes

    @property
    def places(self) -> int:
        """Processes of the recipe: W, or S if that is more."""
        return max(self.world_size, self.super_classes)

    @property
    def training_size(self) -> int:
        """Places of a training group."""
        return self.places // self.super_classes

    @property
    def clustering_size(self) -> int:
        """Places of a clustering group."""
        return self.places // self.super_clusters

    def place(self, number: int) -> Place:
        rank = number % self.clustering_size
        return Place(
            training_rank=number % self.training_size,
            super_class=number // self.training_size,
            clustering_rank=rank,
            super_cluster=number // self.clustering_size,
            rotation=rank // self.training_size if self.rotnet else 0,
        )

    def of_rank(self, rank: int) -> list[Place]:
        """The places that a process takes."""
        each = self.places // self.world_size
        return [self.place(number) for number in range(rank * each, (rank + 1) * each)]

    def clusters_of_rank(self, rank: int) -> list[int]:
        return sorted({place.super_cluster for place in self.of_rank(rank)})


class Groups:
    """The process groups of a layout that this process belongs to; made once, by all processes together."""

    def __init__(self, layout: Layout):
        self.layout, self.rank = layout, distributed.get_rank()
        self.clustering_size = max(1, layout.world_size // layout.super_clusters)  # processes, not places
        self.training = distributed.neighbours(layout.training_size)
        self.clustering = distributed.neighbours(self.clustering_size)
        self.places = layout.of_rank(self.rank)


# --- Whitening --------------------------------------------------------------------------------------------------------


@dataclass
class Whitening:
    """PCA with components divided by their standard deviations, then rows at unit length.

    Attributes:
        mean, matrix: (D,) and (D, d).
    """

    mean: Tensor
    matrix: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return F.normalize((rows - self.mean) @ self.matrix, dim=1)

    @classmethod
    def fit(cls, rows: Tensor, dim: int) -> "Whitening":
        """To the rows of all processes, (n, D) on each, at least ``dim`` together; the first one decomposes for all."""
        mean, covariance, number = mean_and_covariance(rows, rows.device)
        most = min(number, rows.shape[1])
        if not 1 <= dim <= most:
            what = f"{number} features of {rows.shape[1]} dimensions"
            raise ValueError(f"--dim_pca {dim}: {what} have between 1 and {most} principal components")
        variances, directions = torch.linalg.eigh(covariance)
        variances, directions = variances.flip(0)[:dim], directions.flip(1)[:, :dim]
        scale = variances.clamp_min(LEAST_VARIANCE * variances[0]).rsqrt()
        if variances[0] <= ROUNDING * mean.double().square().sum():  # all features are equal: no noise is made of them
            scale = torch.zeros_like(scale)
        return cls(mean, distributed.broadcast((directions * scale).float()))


def images_for_pca(dim: int, batch_size: int, places: int) -> int:
    """How many images the components of D-dimensional features are found on, the first ones: D (D - 1) / 2 of them,
    in whole batches of all places.
    """
    step = batch_size * places
    return dim * (dim - 1) // 2 // step * step


def whiten(batches: Iterable[Tensor], batches_for_pca: int, dim: int) -> Tensor:
    """Whitened rows of this process, fitted to its first batches and those of the others; every process has as many."""
    batches = iter(batches)
    first = torch.cat(list(itertools.islice(batches, max(1, batches_for_pca))))
    whitening = Whitening.fit(first, dim)
    return torch.cat([whitening(first), *(whitening(batch) for batch in batches)])


# --- k-means ----------------------------------------------------------------------------------------------------------


def nearest_as_released(rows: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of each of the rows of unit length, by the released formula of the distances."""
    norms, blocks = centroids.square().sum(dim=1), rows.split(max(1, BLOCK_SCORES // len(centroids)))
    return torch.cat([(1 - 2 * block @ centroids.t() + norms).argmin(dim=1) for block in blocks])


def kmeans(
    rows: Tensor,
    centroids: Tensor,
    iterations: int,
    group: dist.ProcessGroup | None = None,
    released: int | None = None,
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means over the rows of a group of processes, which ends with an assignment.

    Args:
        rows: Of this process, of unit length, (n, d).
        centroids: To start from, (K, d), the same on every process of the group. They become means, which are no unit
            vectors.
        iterations: Updates of the centroids.
        group: None: all processes.
        released: Number of the group, for the released rule of empty clusters (:func:`split_as_released`); None: ours
            (:func:`split_largest`).
        batch_size: As released: of rows beyond whole batches nothing is known, their label is -1; None: of all.

    Returns:
        Cluster of each row, int64, (n,); centroids, the same on every process of the group.
    """
    visited = rows if batch_size is None else rows[: len(rows) // batch_size * batch_size]
    centroids, on_cpu = centroids.clone(), rows.device.type == "cpu"
    # the last bit of a mean or of a distance decides what becomes of the halves of a released split
    add_up = sum_by_cluster_on_cpu if on_cpu and released is None else sum_by_cluster
    for iteration in range(iterations + 1):
        if released is None:
            labels, _ = nearest(visited, centroids, centroids.square().sum(dim=1) / -2)
        else:
            labels = nearest_as_released(visited, centroids)
        counts = distributed.all_reduce_sum(labels.bincount(minlength=len(centroids)), group)
        if iteration == iterations and counts.all():
            break
        sums = distributed.all_reduce_sum(add_up(visited, labels, len(centroids)), group)
        before = centroids
        if iteration < iterations:
            means = sums.float() / counts.clamp_min(1)[:, None]
            centroids = torch.where((counts > 0)[:, None], means, centroids)
        if released is None:
            split_largest(visited, labels, centroids, counts, sums, group)
        else:
            split_as_released(labels, centroids, counts, released)
        if iteration < iterations and torch.equal(centroids, before):
            break  # all that follows would be the same
    unknown = labels.new_full((len(rows) - len(visited),), NO_CLUSTER)
    return torch.cat([labels, unknown]), centroids


def split_largest(
    rows: Tensor, labels: Tensor, centroids: Tensor, counts: Tensor, sums: Tensor, group: dist.ProcessGroup | None
) -> None:
    """Give every empty cluster a part of the largest one, in place: its rows on one side of a plane through their mean.

    After it no cluster is empty, unless the largest one consists of equal rows. Nothing is drawn at random.

    Args:
        counts, sums: Rows of each cluster, (K,), and their sum, (K, d), over the group.
    """
    normal = torch.where(torch.arange(rows.shape[1], device=rows.device) % 2 == 0, 1.0, -1.0)
    for empty in (counts == 0).nonzero().flatten().tolist():
        donor = int(counts.argmax())
        mean = (sums[donor] / counts[donor]).float()
        members = (labels == donor).nonzero().flatten()
        taken = members[(rows[members] - mean) @ normal > 1e-6]
        moved = torch.cat([counts.new_tensor([len(taken)]).double(), rows[taken].double().sum(dim=0)])
        number, moved = int((moved := distributed.all_reduce_sum(moved, group))[0]), moved[1:]
        if number in (0, int(counts[donor])):
            return
        labels[taken] = empty
        for cluster, change in ((empty, number), (donor, -number)):
            counts[cluster] += change
            sums[cluster] += moved if change > 0 else -moved
            centroids[cluster] = (sums[cluster] / counts[cluster]).float()


def split_as_released(labels: Tensor, centroids: Tensor, counts: Tensor, group_number: int) -> None:
    """The released code's rule, in place: a cluster drawn from those that are not empty gives half of its rows.

    It seeds anew for every empty cluster, so that all of a pass have the same donor; the halves are its first rows and
    the rest, by a count over the group that each process takes for its own.
    """
    filled = (counts > 0).nonzero().flatten().cpu().numpy()
    apart = torch.where(torch.arange(centroids.shape[1], device=labels.device) % 2 == 0, -CLOSE, CLOSE)
    for empty in (counts == 0).nonzero().flatten().tolist():
        donor = int(np.random.RandomState(group_number).choice(filled))
        centroids[empty] = centroids[donor] + apart
        centroids[donor] -= apart
        counts[empty] = counts[donor] // 2
        counts[donor] -= counts[empty]
        labels[(labels == donor).nonzero().flatten()[: int(counts[donor])]] = empty


# --- Two levels -------------------------------------------------------------------------------------------------------


@dataclass
class Clusters:
    """Super- and sub-classes of the images.

    Attributes:
        super_clusters, sub_clusters: Of each image, and within that one, int64, (N,); -1: in none.
        num_super, num_sub: C, and the sub-clusters of each super-cluster.
    """

    super_clusters: Tensor
    sub_clusters: Tensor
    num_super: int
    num_sub: int

    def assignments(self) -> Tensor:
        """One number for both levels, (N,); -1: in none."""
        return torch.where(self.sub_clusters < 0, -1, self.super_clusters * self.num_sub + self.sub_clusters)

    def members(self, super_cluster: int) -> Tensor:
        """Images of a super-cluster that have a sub-cluster, in ascending order."""
        return ((self.super_clusters == super_cluster) & (self.sub_clusters >= 0)).nonzero().flatten()


def find_clusters(
    rows: Tensor,
    num_images: int,
    groups: Groups,
    num_clusters: int,
    iterations: int,
    seed: int,
    start_images: int,
    released_batch: int | None = None,
) -> Clusters:
    """k-means into super-clusters over all processes, then of each one into sub-clusters in its clustering group.

    Args:
        rows: Whitened features of this process's images, every W-th one.
        num_images: N.
        num_clusters: Sub-clusters of all super-clusters together.
        seed: Of the images that the centroids start from.
        start_images: The super-clusters start from some of the first so many images.
        released_batch: Images of a batch, for the rules of the released code: for empty clusters, and images beyond
            whole batches of a clustering group are in no sub-cluster. None: ours.
    """
    layout, rng = groups.layout, np.random.RandomState(seed % 2**32)
    c, num_sub = layout.super_clusters, num_clusters // layout.super_clusters
    released = (lambda number: None) if released_batch is None else (lambda number: number)
    super_clusters = torch.zeros(num_images, dtype=torch.long)
    if c > 1:
        if start_images < c:
            raise ValueError(
                f"--super_classes {layout.super_classes}: {start_images} images are less than {c} clusters"
            )
        start = torch.from_numpy(rng.choice(start_images, c, replace=False))
        labels, _ = kmeans(rows, rows_of_all(rows, start), iterations, None, released(0))
        super_clusters = labels_of_all(labels, torch.arange(groups.rank, num_images, layout.world_size), num_images)

    # who gets which images; every process knows that of all others
    wanted, parts = [], []
    for rank in range(layout.world_size):
        mine = []
        for s in layout.clusters_of_rank(rank):
            images = (super_clusters == s).nonzero().flatten()
            if released_batch is not None:
                step = released_batch * layout.clustering_size
                images = images[: len(images) // step * step]
            local, size = rank % groups.clustering_size, groups.clustering_size
            mine.append(images[len(images) * local // size : len(images) * (local + 1) // size])
        wanted.append(torch.cat(mine))
        parts.append([len(images) for images in mine])
    received = exchange_rows(rows, wanted).split(parts[groups.rank])
    found = []
    for s, share in zip(layout.clusters_of_rank(groups.rank), received, strict=True):
        drawn = np.random.RandomState((seed + 1 + s) % 2**32)
        start = draw_start(share, num_sub, groups, drawn)
        found.append(kmeans(share, start, iterations, groups.clustering, released(s))[0])
    sub_clusters = labels_of_all(torch.cat(found), wanted[groups.rank], num_images)
    return Clusters(super_clusters, sub_clusters, c, num_sub)


def draw_start(share: Tensor, number: int, groups: Groups, rng: np.random.RandomState) -> Tensor:
    """Random rows of a clustering group, (number, d); some several times if there are fewer."""
    local, size = groups.rank % groups.clustering_size, groups.clustering_size
    lengths = torch.zeros(size, dtype=torch.long, device=share.device)
    lengths[local] = len(share)
    lengths = distributed.all_reduce_sum(lengths, groups.clustering)
    total, first = int(lengths.sum()), int(lengths[:local].sum())
    if total == 0:
        raise ValueError("--super_classes: a super-cluster has no images; lower it, or take more images")
    chosen = torch.from_numpy(rng.choice(total, number, replace=total < number)).to(share.device)
    start, here = share.new_zeros(number, share.shape[1]), (chosen >= first) & (chosen < first + len(share))
    start[here] = share[chosen[here] - first]
    return distributed.all_reduce_sum(start, groups.clustering)  # the others have zeros there


def exchange_rows(rows: Tensor, wanted: Sequence[Tensor]) -> Tensor:
    """The rows that this process wants, in its order, of which every process has those (n, d) of every W-th image.

    Args:
        wanted: Images that each process wants.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    if world_size == 1:
        return rows[wanted[0].to(rows.device)]
    sent = [images[images % world_size == rank] // world_size for images in wanted]
    owners = wanted[rank] % world_size
    received = rows.new_empty(len(owners), rows.shape[1])
    counts = owners.bincount(minlength=world_size).tolist()
    outgoing = rows[torch.cat(sent).to(rows.device)]
    dist.all_to_all_single(received, outgoing, counts, [len(part) for part in sent])
    in_order = torch.empty_like(received)
    in_order[owners.argsort(stable=True).to(rows.device)] = received
    return in_order


# --- From clusters to batches -----------------------------------------------------------------------------------------


def epoch_sizes(num_images: int, batch_size: int, layout: Layout, released: bool) -> tuple[int, int]:
    """How many images are used, and how many of them an epoch shows to each training group.

    An epoch shows a group a quarter of a super-cluster, with rotations and without, in whole batches of at least one.

    Args:
        batch_size: Of each place.
        released: Both are cut to whole batches of all places together, not only of those of a group.
    """
    step = batch_size * (layout.places if released else layout.training_size)
    used = num_images // step * step if released else num_images
    shown = used // layout.super_clusters // 4 // step * step
    if shown == 0:
        raise ValueError(
            f"--batch_size {batch_size}: an epoch shows each of {layout.super_classes} super-classes "
            f"{used // layout.super_clusters // 4} of {num_images} images, less than a batch"
        )
    return used, shown


class GroupBatches:
    """Batches of the places of this process one after another, drawn uniformly over sub-clusters, resumable.

    An item is the key of a :class:`shared.multicrop.MultiCropDataset`: (a number made of the epoch, the super-class and
    of how often the image has been drawn before, the image).

    Args:
        shown: Images of an epoch for each training group.
        batch_size: Of each place.
    """

    def __init__(self, places: Sequence[Place], training_size: int, shown: int, batch_size: int, seed: int):
        self.places, self.training_size = places, training_size
        self.shown, self.batch_size, self.seed = shown, batch_size, seed
        self.epoch = self.start_step = 0
        self.clusters: Clusters | None = None

    def __len__(self) -> int:
        return self.shown // (self.batch_size * self.training_size)

    def set_epoch(self, epoch: int, clusters: Clusters, start_step: int = 0) -> None:
        """Choose the epoch, its clusters, and how many of its batches were done already; those are not loaded."""
        self.epoch, self.clusters, self.start_step = epoch, clusters, start_step

    def draw(self, place: Place) -> list[tuple[int, int]]:
        """Keys of a place's images of the epoch, in order."""
        members = self.clusters.members(place.super_cluster).numpy()
        lists = cluster_lists(self.clusters.sub_clusters.numpy()[members], self.clusters.num_sub)
        seed = derive_seed(self.seed, self.epoch, place.super_class)
        drawn = draw_uniformly([members[i] for i in lists], self.shown, np.random.RandomState(seed % 2**32))
        mine = slice(place.training_rank, None, self.training_size)
        times, images = count_repetitions(drawn)[mine].tolist(), drawn[mine].tolist()
        first = (self.epoch, place.super_class)
        return [(derive_seed(*first, time), image) for time, image in zip(times, images, strict=True)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        drawn = [self.draw(place) for place in self.places]
        for step in range(self.start_step, len(self)):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            yield [key for keys in drawn for key in keys[batch]]


# --- What is learned of the clusters ----------------------------------------------------------------------------------


class Heads(nn.Module):
    """Scores of super-classes and, for each training group of this process, of its sub-classes.

    The scores of super-classes are the same module on every process; those of sub-classes are a group's own.

    Args:
        seed: Of the initial weights, which for a super-class do not depend on the process.
    """

    def __init__(self, dim: int, groups: Groups, num_sub: int, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            self.super_class = nn.Linear(dim, groups.layout.super_classes)
            self.sub_class = nn.ModuleList()
            for place in groups.places:
                torch.manual_seed(derive_seed(seed, place.super_class) % 2**63)
                self.sub_class.append(nn.Linear(dim, num_sub))


class ClusteringState:
    """What a checkpoint holds of the clusters: both levels, their heads with momenta, and when they were found.

    Attributes:
        epoch: In which they were found; -1: never.
        optimizers: Of super- and sub-classes.
    """

    epoch, clusters, heads, evaluated_before = -1, None, None, False
    optimizers: tuple[torch.optim.Optimizer, ...] = ()

    def __init__(self, dim: int, groups: Groups, images: int, build_sgd: Callable, device: torch.device):
        self.dim, self.groups, self.images, self.build_sgd, self.device = dim, groups, images, build_sgd, device

    def take(self, clusters: Clusters, epoch: int, seed: int) -> None:
        """Start with new clusters: new heads, but super-classes that are rotations alone keep theirs."""
        kept = self.heads and self.heads.super_class, self.optimizers[:1]
        self.epoch, self.clusters = epoch, clusters
        self._start(seed)
        if clusters.num_super == 1 and kept[0] is not None:
            self.heads.super_class, self.optimizers = kept[0], (*kept[1], self.optimizers[1])

    def _start(self, seed: int = 0) -> None:
        self.heads = Heads(self.dim, self.groups, self.clusters.num_sub, seed).to(self.device)
        self.optimizers = tuple(map(self.build_sgd, (self.heads.super_class, self.heads.sub_class)))

    def sub_class_tensors(self) -> list[list[Tensor]]:
        """Weights, biases and their momenta, each of the groups of this process."""
        heads, momenta = self.heads.sub_class, self.optimizers[1].state
        parts = [[getattr(head, name) for head in heads] for name in ("weight", "bias")]
        return parts + [[momenta[p]["momentum_buffer"] for p in part] for part in parts]

    def state_dict(self) -> dict:
        """Sub-classes are those of all training groups, in their order, on rank 0; every process must call this."""
        state = {"images": self.images, "clustered_epoch": self.epoch, "evaluated_before": self.evaluated_before}
        if self.heads is None:
            return state | {"clusters": None}
        gathered = [
            distributed.gather_on_main(torch.stack([t.detach() for t in part]), self.groups.layout.training_size)
            for part in self.sub_class_tensors()
        ]
        return state | {
            "clusters": vars(self.clusters),
            "pred_layer_state_dict": self.heads.super_class.state_dict(),
            "optimizer_pred_layer": self.optimizers[0].state_dict(),
            "sub_classes": [None if part is None else part.flatten(0, 1) for part in gathered],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Without clusters (an official file has none) only the scores of rotations go on."""
        self.evaluated_before = state["evaluated_before"]
        if state.get("clusters") and state["images"] == self.images:
            self.epoch, self.clusters = state["clustered_epoch"], Clusters(**state["clusters"])
            self._start()
            for here, all_groups in zip(self.sub_class_tensors(), state["sub_classes"], strict=True):
                for tensor, place in zip(here, self.groups.places, strict=True):
                    tensor.copy_(all_groups[place.super_class])
        elif self.groups.layout.super_clusters == 1 and state.get("pred_layer_state_dict"):
            self.clusters = Clusters(torch.zeros(0), torch.zeros(0), 1, 1)
            self._start()
        else:
            return
        self.heads.super_class.load_state_dict(state["pred_layer_state_dict"])
        options = [dict(group) for group in self.optimizers[0].param_groups]
        load_optimizer_state(self.optimizers[0], state["optimizer_pred_layer"])
        keep_options(self.optimizers[0], options, but=())  # the rate is that of the flags
