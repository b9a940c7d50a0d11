"""A picture of nearest neighbours in feature space: what a backbone holds for alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed
from shared.images.decode import ImageError
from shared.images.loading import BadImages, EvalDataset, EvalTransform
from shared.images.sources import ImageSource
from shared.multicrop import MultiCropDataset
from shared.pictures.sheets import save_neighbours

from .features import extract_features
from .knn import nearest_neighbours
from .knn_monitor import KNNMonitor

QUERIES = 10
NEIGHBOURS = 8
MOST_IMAGES = 2000  # of one set that is searched for its own neighbours
THUMBNAIL_PX = 96


@dataclass
class Gallery:
    """Images of a source with their features: feature i, shape (D,), belongs to image ``rows[i]``."""

    source: ImageSource
    rows: Sequence[int]
    features: Tensor


def sample_gallery(backbone: nn.Module, source: ImageSource, transform: EvalTransform, device: torch.device) -> Gallery:
    """At most ``MOST_IMAGES`` images, evenly spaced over the source; every rank must call this."""
    rows = np.linspace(0, len(source) - 1, min(MOST_IMAGES, len(source))).astype(int).tolist()
    few = EvalDataset(source, transform, BadImages(len(source), max_fraction=1), rows)
    features, _ = extract_features(backbone, few, device)
    return Gallery(source, rows, features)


def save_nearest(queries: Gallery, database: Gallery, path: str | Path) -> Path:
    """Ten queries, evenly spaced, and their nearest neighbours by cosine similarity.

    Args:
        queries: The same object as ``database`` to search a set for its own neighbours; an image is then not counted
            among its neighbours.
        path: PNG file to write.
    """
    chosen = torch.linspace(0, len(queries.rows) - 1, min(QUERIES, len(queries.rows))).long()
    itself = int(queries is database)  # the nearest neighbour of an image is itself
    similarities, indices = nearest_neighbours(
        F.normalize(queries.features[chosen], dim=1),
        F.normalize(database.features, dim=1),
        min(NEIGHBOURS + itself, len(database.rows)),
    )
    similarities = similarities[:, itself:].tolist()
    query_rows = [queries.rows[i] for i in chosen.tolist()]
    neighbour_rows = [[database.rows[j] for j in row] for row in indices[:, itself:].tolist()]
    labelled = queries.source.classes is not None
    return save_neighbours(
        [_thumbnail(queries.source, i) for i in query_rows],
        [[_thumbnail(database.source, j) for j in row] for row in neighbour_rows],
        path,
        [_class_name(queries.source, i) for i in query_rows] if labelled else None,
        [[_class_name(database.source, j) for j in row] for row in neighbour_rows] if labelled else None,
        similarities,
    )


def _thumbnail(source: ImageSource, row: int) -> Tensor:
    """uint8, (3, THUMBNAIL_PX, THUMBNAIL_PX); grey where the image cannot be read."""
    try:
        return EvalTransform(THUMBNAIL_PX, THUMBNAIL_PX)(source.load(row).decode())
    except ImageError:
        return torch.full((3, THUMBNAIL_PX, THUMBNAIL_PX), 128, dtype=torch.uint8)


def _class_name(source: ImageSource, row: int) -> str:
    return source.classes[source.label(row)]


def save_nearest_neighbours(
    backbone: nn.Module,
    views: MultiCropDataset,
    knn: KNNMonitor,
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    path: Path,
    device: torch.device,
) -> Path | None:
    """:func:`save_nearest` at the end of a training; every rank must call this, rank 0 returns the path.

    Args:
        views: The training set.
        knn: If it has evaluated, queries are validation images, else training images.
        image_size: Side in pixels at which the backbone is evaluated.
        mean, std: For pixels in [0, 1].
    """
    if knn.disabled_reason is None:
        train_features, _, val_features, _ = knn.latest_features or knn.features(backbone)
        database = Gallery(knn.train.source, range(len(train_features)), train_features)
        queries = Gallery(knn.val.source, range(len(val_features)), val_features)
    else:
        transform = EvalTransform(round(image_size * 256 / 224), image_size, mean, std, views.in_chans)
        queries = database = sample_gallery(backbone, views.source, transform, device)
    return save_nearest(queries, database, path) if distributed.is_main_process() else None
