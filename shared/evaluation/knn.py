"""Weighted k-nearest-neighbour classification, and the exact neighbour search below it.

The vote is that of Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (2018,
section 3.4): a neighbour at cosine similarity s adds exp(s / temperature) to its class.
"""

from collections.abc import Sequence
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.optimisation.precision import fast_bf16

from .features import check_features

QUERY_BLOCK = 256
DATABASE_BLOCK = 1 << 17  # similarities of one block against the other: 128 MiB in float32


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent for one k; arguments and errors as :func:`knn_accuracies`."""
    accuracies = knn_accuracies(train_features, train_labels, test_features, test_labels, [k], temperature, num_classes)
    return accuracies[k]


def knn_accuracies(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    temperature: float = 0.07,
    num_classes: int | None = None,
    precision: str = "fp32",
) -> dict[int, tuple[float, float]]:
    """Accuracy of the weighted vote for several k from one search.

    "Top-5" counts a test image when its class is among the min(5, k, C) classes with the most votes. A class without
    a vote is never counted; equal votes rank by class index.

    Args:
        train_features: Shape (N, D), normalised here.
        train_labels: Shape (N,), in 0 .. C - 1.
        test_features: Shape (M, D), any M >= 1.
        test_labels: Shape (M,).
        ks: Numbers of neighbours, each in 1 .. N.
        temperature: Divides the cosine similarities before the exponential.
        num_classes: C; the largest label + 1 when None.
        precision: ``fp32`` or ``bf16`` similarities, see :func:`nearest_neighbours`.

    Returns:
        ``{k: (top-1, top-5)}`` in percent.

    Raises:
        ValueError: For a k outside 1 .. N, fewer than two classes, labels outside 0 .. C - 1, a temperature that
            is not positive, or features that are all zeros or not finite.
    """
    _check_labels(train_labels, train_features, "train")
    _check_labels(test_labels, test_features, "test")
    if num_classes is None:
        num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    if (train_labels == train_labels[0]).all():
        raise ValueError("k-NN needs at least two classes, the train set has one")
    if max(train_labels.max(), test_labels.max()) >= num_classes or min(train_labels.min(), test_labels.min()) < 0:
        raise ValueError(f"labels must lie in 0 .. {num_classes - 1} for num_classes={num_classes}")
    if min(ks) < 1:
        raise ValueError(f"k={min(ks)} is no number of neighbours")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    check_features(train_features)
    check_features(test_features)
    train_labels = train_labels.to(train_features.device)

    hits = {k: torch.zeros(2, dtype=torch.long) for k in ks}
    neighbours = nearest_neighbours(
        F.normalize(test_features, dim=1), F.normalize(train_features, dim=1), max(ks), precision
    )
    # blocks bound the (M, C) matrix of votes
    blocks = zip(*(tensor.split(4096) for tensor in (*neighbours, test_labels)), strict=True)
    for similarities, indices, targets in blocks:
        for k in hits:
            rank = _rank_of_target(similarities[:, :k], train_labels[indices[:, :k]], targets, temperature, num_classes)
            hits[k] += torch.stack([(rank < 1).sum(), (rank < min(5, k, num_classes)).sum()]).cpu()
    return {k: tuple(100 * count / len(test_labels) for count in counts.tolist()) for k, counts in hits.items()}


def _check_labels(labels: Tensor, features: Tensor, name: str) -> None:
    if len(labels) != len(features) or len(labels) == 0:
        raise ValueError(f"{name} set: {len(features)} features and {len(labels)} labels")


def _rank_of_target(
    similarities: Tensor, labels: Tensor, targets: Tensor, temperature: float, num_classes: int
) -> Tensor:
    """Number of classes with more votes than the true one, shape (M,); C where the true class has no vote."""
    votes = count_votes(similarities, labels, num_classes, temperature)
    targets = targets.to(votes.device)[:, None]
    own = votes.gather(1, targets)
    earlier = torch.arange(num_classes, device=votes.device) < targets
    rank = ((votes > own) | ((votes == own) & earlier)).sum(dim=1)
    return rank.where(own[:, 0] > 0, torch.full_like(rank, num_classes))


def count_votes(similarities: Tensor, labels: Tensor, num_classes: int, temperature: float = 0.07) -> Tensor:
    """Votes for each class, (M, C), in units of that of the nearest neighbour.

    Args:
        similarities: Of the k nearest neighbours, the nearest first, (M, k).
        labels: Their classes, (M, k).
    """
    weights = ((similarities - similarities[:, :1]) / temperature).exp().float()  # in (0, 1]: cannot overflow
    return weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels, weights)


def nearest_neighbours(queries: Tensor, database: Tensor, k: int, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """The k database rows with the largest inner product with each query, best first.

    ``fp32`` returns the float32 neighbours. Where the CPU multiplies bfloat16 faster, a bfloat16 product proposes
    candidates, float32 orders them, and an error bound proves for each query that nothing was missed; queries
    without that proof are searched again in float32. ``bf16`` trusts the bfloat16 product alone.

    Args:
        queries: Shape (M, D).
        database: Shape (N, D), on the same device.
        k: Number of neighbours, 1 .. N.
        precision: ``fp32`` or ``bf16``.

    Returns:
        Inner products (M, k) in float32 and database indices (M, k) in int64.

    Raises:
        ValueError: For a k outside 1 .. N or an unknown precision.
    """
    if not 1 <= k <= len(database):
        raise ValueError(f"k={k} neighbours asked of a database of {len(database)}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, got {precision!r}")
    if precision == "bf16":
        search = _Search(database.bfloat16(), k)
        queries = queries.bfloat16()
    elif database.device.type == "cpu" and fast_bf16(database.device):
        search = _ScreenedSearch(database, k)
    else:
        search = _Search(database, k)
    similarities, indices = zip(*(search(block) for block in queries.split(QUERY_BLOCK)), strict=True)
    return torch.cat(similarities), torch.cat(indices)


class _Search:
    """Top k of the products in the precision of its arguments, for blocks of at most QUERY_BLOCK queries."""

    def __init__(self, database: Tensor, k: int):
        self.database = database
        self.k = k
        num_rows = min(len(database), DATABASE_BLOCK)
        # kept between calls: fresh pages cost as much as the selection
        self.workspace = database.new_empty((num_rows + isqrt(num_rows)) * QUERY_BLOCK)

    def __call__(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = [], []
        for start in range(0, len(self.database), DATABASE_BLOCK):
            block_values, block_indices = self._top_k_of_block(queries, self.database[start : start + DATABASE_BLOCK])
            values.append(block_values)
            indices.append(block_indices + start)
        values, order = torch.cat(values, dim=1).topk(self.k, dim=1)
        return values, torch.cat(indices, dim=1).gather(1, order)

    def _top_k_of_block(self, queries: Tensor, database: Tensor) -> tuple[Tensor, Tensor]:
        """Top k by groups of G rows: the k groups with the largest maxima hold the k largest values.

        The product is read once, for the maxima (a vectorised pass). The selection itself sees N / G maxima and
        k * G candidates per query instead of N values; a candidate costs about 8 times as much, as it is gathered.
        """
        num_rows, num_queries = len(database), len(queries)
        k = min(self.k, num_rows)
        group = max(1, isqrt(num_rows // (8 * k)))
        num_groups = -(-num_rows // group)
        products = self.workspace[: group * num_groups * num_queries].view(group * num_groups, num_queries)
        torch.mm(database, queries.t(), out=products[:num_rows])  # (N, M): the maxima run along whole rows
        products[num_rows:] = -torch.inf
        products = products.view(group, num_groups, num_queries)

        groups = products.amax(dim=0).float().t().contiguous().topk(k, dim=1).indices  # (M, k)
        candidates = products.gather(1, groups.t().expand(group, k, num_queries)).float()
        values, order = candidates.permute(2, 1, 0).reshape(num_queries, k * group).topk(k, dim=1)
        return values, groups.gather(1, order // group) + num_groups * (order % group)


class _ScreenedSearch:
    """Float32 neighbours with candidates from a bfloat16 product.

    With e a bound on the error of a bfloat16 product, every true neighbour scores at least the k-th best bfloat16
    value - 2 e. If the worst candidate scores less than that, all neighbours are among the candidates; a query
    without this proof is searched again in float32.
    """

    def __init__(self, database: Tensor, k: int):
        self.database = database
        self.k = k
        rounded = database.bfloat16()
        self.screen = _Search(rounded, min(2 * k + 32, len(database)))
        self.search = _Search(database, k)
        self.rounding = (database - rounded).norm(dim=1).max()
        self.largest = rounded.float().norm(dim=1).max()

    def __call__(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        rounded = queries.bfloat16()
        screened, candidates = self.screen(rounded)
        rows = self.database.index_select(0, candidates.flatten()).view(*candidates.shape, -1)  # (M, pool, D)
        exact = (rows * queries[:, None]).sum(dim=2)
        values, order = exact.topk(self.k, dim=1)
        indices = candidates.gather(1, order)

        proven = self._proven(queries, rounded, screened)
        if not proven.all():
            values[~proven], indices[~proven] = self.search(queries[~proven])
        return values, indices

    def _proven(self, queries: Tensor, rounded: Tensor, screened: Tensor) -> Tensor:
        """Which queries (M,) have all their neighbours among the candidates."""
        if screened.shape[1] == len(self.database):
            return torch.ones(len(queries), dtype=torch.bool)
        # q.d - q'.d' = (q - q').d' + q.(d - d'), then bfloat16 rounding of the result (2^-8 is twice its unit)
        # and float32 accumulation over D terms
        norms = queries.norm(dim=1)
        error = (queries - rounded).norm(dim=1) * self.largest + norms * self.rounding
        error += 2**-8 * screened.abs().amax(dim=1) + 2**-23 * queries.shape[1] * norms * self.largest
        return screened[:, -1] < screened[:, self.k - 1] - 2 * error
