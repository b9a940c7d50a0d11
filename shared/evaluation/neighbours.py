"""A picture of nearest neighbours in feature space: what a backbone holds for alike."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import distributed
from shared.data import EvalDataset, EvalTransform, ImageSource
from shared.multicrop import MultiCropDataset
from shared.pictures import save_neighbours

from .features import extract_features
from .knn import nearest_neighbours
from .knn_monitor import KNNMonitor

QUERIES = 10
NEIGHBOURS = 8
MOST_IMAGES = 2000  # searched for neighbours when there is no validation split


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
    """Write the nearest neighbours of ten images; every rank must call this, rank 0 returns the path.

    Args:
        views: The training set.
        knn: If it has evaluated, queries are validation images, else training images.
        image_size: Side in pixels at which the backbone is evaluated.
        mean, std: For pixels in [0, 1].
    """
    if knn.off is None:
        queries, database = knn.val.source, knn.train.source
        database_features, _, query_features, _ = knn.latest_features or knn.features(backbone)
        same_images = False
    else:
        queries = database = views.source
        few = torch.utils.data.Subset(
            EvalDataset(database, EvalTransform(round(image_size * 256 / 224), image_size, mean, std, views.in_chans)),
            range(min(MOST_IMAGES, len(database))),
        )
        database_features, _ = extract_features(backbone, few, device)
        query_features, same_images = database_features, True
    if not distributed.is_main_process():
        return None
    return _save(queries, query_features, database, database_features, path, same_images)


def _save(
    queries: ImageSource,
    query_features: Tensor,
    database: ImageSource,
    database_features: Tensor,
    path: Path,
    same_images: bool,
) -> Path:
    rows = torch.linspace(0, len(query_features) - 1, min(QUERIES, len(query_features))).long()
    skip = int(same_images)  # an image is its own nearest neighbour
    k = min(NEIGHBOURS + skip, len(database_features))
    similarities, indices = nearest_neighbours(
        F.normalize(query_features[rows], dim=1), F.normalize(database_features, dim=1), k
    )
    similarities, indices = similarities[:, skip:].tolist(), indices[:, skip:].tolist()
    size = 96  # pixels of a thumbnail
    thumbnail = EvalTransform(size, size)

    def picture(source: ImageSource, index: int) -> Tensor:
        return thumbnail(source.load(index).decode())

    def name(source: ImageSource, index: int) -> str:
        return source.classes[source.label(index)]

    labelled = queries.classes is not None
    return save_neighbours(
        [picture(queries, i) for i in rows.tolist()],
        [[picture(database, j) for j in row] for row in indices],
        path,
        [name(queries, i) for i in rows.tolist()] if labelled else None,
        [[name(database, j) for j in row] for row in indices] if labelled else None,
        similarities,
    )
